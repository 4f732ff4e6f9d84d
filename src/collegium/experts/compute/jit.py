"""Numba, if this machine has a working one.

Kernel modules import the compiler's names from here, so that they can be imported (and listed in the catalogue) on a
machine without Numba; `missing` then holds the reason, and nobody may call a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["carray", "cfunc", "cgutils", "intrinsic", "ir", "missing", "njit", "types"]

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
