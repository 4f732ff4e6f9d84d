"""Memory for the gradients of expert weights.

Autograd wants a dense gradient for each weight, and a layer's experts are large: a backward pass that asks the system
for fresh memory spends most of its time waiting for zeroed pages. So

* where a quarter of the experts or more are hit, memory of an earlier gradient that nobody holds any more is used
  again. After ``optimizer.zero_grad()`` it waits for the next backward pass instead of going back to the system, so a
  training process needs no more at its peak, but keeps it between steps; `release_gradient_memory` gives it back.
* where fewer are hit, memory comes from ``calloc``, which costs nothing until it is touched, and the gradients of the
  other experts never are. numpy asks for huge pages, which makes the first touch cheaper.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["gradient_like", "lazy_zeros", "release_gradient_memory"]

_ALIGNMENT = 64
_MAX_AGE = 1024
"""A block that was not used for this many requests belonged to another model; it is given back."""

_idle: dict[int, list[tuple[int, np.ndarray]]] = {}
"""Bytes -> blocks that wait, with the number of the request that used them last."""
_requests = itertools.count()


def release_gradient_memory() -> None:
    """Give the memory that waits for the next gradients back to the system."""
    _idle.clear()


def gradient_like(w: Tensor, hit: Sequence[int]) -> Tensor:
    """A gradient for w ``[E, ...]`` that is zero for all experts but those in `hit`, whose content is undefined."""
    if 4 * len(hit) < len(w):
        return lazy_zeros(w.shape, w.dtype)
    gradient = _recycled(w.shape, w.dtype)
    for e in set(range(len(w))).difference(hit):
        gradient[e].zero_()
    return gradient


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros whose memory the system provides only where it is touched."""
    return _tensor(np.zeros(math.prod(shape) * dtype.itemsize + _ALIGNMENT, dtype=np.uint8), shape, dtype)


def _recycled(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    now, nbytes = next(_requests), math.prod(shape) * dtype.itemsize
    for size, blocks in list(_idle.items()):
        _idle[size] = [(used, block) for used, block in blocks if now - used < _MAX_AGE]
    waiting = _idle.setdefault(nbytes, [])
    block = waiting.pop()[1] if waiting else np.empty(nbytes + _ALIGNMENT, dtype=np.uint8)
    lent = block[:]  # lives exactly as long as the tensor's storage
    weakref.finalize(lent, _take_back, nbytes, now, block).atexit = False
    return _tensor(lent, shape, dtype)


def _take_back(nbytes: int, used: int, block: np.ndarray) -> None:
    _idle.setdefault(nbytes, []).append((used, block))


def _tensor(block: np.ndarray, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The aligned part of a block, as a tensor that keeps the block alive."""
    start = -block.ctypes.data % _ALIGNMENT
    return torch.from_numpy(block)[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
