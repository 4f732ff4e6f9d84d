"""Run a kernel on the threads that torch already has.

torch's operators leave their OpenMP threads spinning for a while. A second pool (Numba's) would fight them for the
cores and halve the speed of a kernel of a few milliseconds. So a kernel is handed to the very OpenMP runtime that torch
is linked to; its threads are awake, and starting on them takes microseconds.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

__all__ = ["float_bits", "launch", "run_here"]

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """``GOMP_parallel(function, data, threads, flags)`` of torch's own OpenMP runtime, or None (macOS, Windows).

    Looking a symbol up in a loaded library also searches the libraries that one needs, so this finds the runtime torch
    really uses, and not another copy that something else brought into the process.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@functools.cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="collegium-compute")


def launch(kernel: int, *parameters: int) -> None:
    """Run the kernel at address `kernel` on ``torch.get_num_threads()`` threads and wait for it.

    Args:
        kernel: address of a C function that takes a pointer to int64 parameters.
        parameters: what it gets after the shared counter, which starts at 0.
    """
    data = (ctypes.c_int64 * (len(parameters) + 1))(0, *parameters)
    pointer, threads, parallel = ctypes.addressof(data), torch.get_num_threads(), _openmp()
    function = _KERNEL(kernel)
    if threads == 1:
        function(pointer)
    elif parallel is not None:
        parallel(kernel, pointer, threads, 0)
    else:  # ctypes lets go of the interpreter lock, so plain threads do; starting them costs some 50 us
        others = [_helpers(threads - 1).submit(function, pointer) for _ in range(threads - 1)]
        function(pointer)
        for other in others:
            other.result()


def run_here(kernel: int, *parameters: int) -> None:
    """Run a kernel on the calling thread alone: for work that is over before another thread would have begun."""
    data = (ctypes.c_int64 * (len(parameters) + 1))(0, *parameters)
    _KERNEL(kernel)(ctypes.addressof(data))


def float_bits(value: float) -> int:
    """The bits of a number as float32, which is how a kernel's int64 parameters hold it."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
