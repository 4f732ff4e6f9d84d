"""Numba's ``njit``; on a machine without it, functions that say so when they are called.

Modules with compiled loops can so be imported, and listed in the catalogue, everywhere.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from collegium.errors import ConfigError

__all__ = ["njit", "num_threads"]

try:
    from numba import njit
except ImportError as error:  # not installed, or refusing this version of numpy
    reason = str(error)

    def njit(*args: Any, **options: Any) -> Callable[..., Any]:
        """Make the function refuse to run."""

        def refuse(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def call(*values: Any, **named: Any) -> Any:
                raise ConfigError(f"{function.__name__} needs Numba, which cannot be imported here: {reason}")

            return call

        return refuse(args[0]) if args else refuse


def num_threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
