"""Numba, if this machine has a working one.

Kernel modules import the compiler's names from here, so that they can be imported (and listed in the catalogue) on a
machine without Numba; `missing` then holds the reason, and nobody may call a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["LANES", "WIDE", "carray", "cfunc", "cgutils", "intrinsic", "ir", "missing", "njit", "types"]

missing: ImportError | None = None

try:
    from llvmlite import ir
    from numba import carray, cfunc, njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError as error:  # not installed, or refusing this version of numpy
    missing = error
    ir = types = cgutils = carray = cfunc = None

    def njit(*args: Any, **options: Any) -> Callable[..., Any]:
        """Leave the function as it is."""
        return args[0] if args else lambda function: function

    intrinsic = njit


def _vector_registers() -> tuple[int, bool]:
    """``(floats in a vector register, whether there are 32 of them)``."""
    if missing is not None:
        return 16, True
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features()
    if features.get("avx512f"):
        return 16, True
    return (8, False) if features.get("avx2") else (4, True)


LANES, WIDE = _vector_registers()
