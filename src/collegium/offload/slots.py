"""`SlotPool`: the fast tier, equal slots in one block of memory whose size is fixed when it is made.

Reads go straight into slots and kernels compute straight from them; nothing is copied. On a GPU the same two calls
would hand out device memory, and a read would be a copy from pinned host memory on a stream.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from collegium.experts.stored import ALIGNMENT
from collegium.offload.geometry import Array

__all__ = ["SlotPool"]


class SlotPool:
    """`count` slots of `nbytes`, each aligned for direct reads. Pages are the system's until a slot is first filled."""

    def __init__(self, count: int, nbytes: int) -> None:
        self.count, self.nbytes = count, self.slot_bytes([nbytes])
        # anonymous memory begins at a page; torch's own allocator promises 64 bytes only
        block = mmap.mmap(-1, max(count, 1) * self.nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)  # a slot is megabytes: fewer entries in the address tables
        self._bytes = np.frombuffer(block, np.uint8).reshape(max(count, 1), self.nbytes)
        self._tensors = list(torch.from_numpy(self._bytes).unbind(0))

    @staticmethod
    def slot_bytes(sizes: Sequence[int]) -> int:
        """Of a slot that takes any record of these sizes."""
        return -(-max(sizes) // ALIGNMENT) * ALIGNMENT

    def buffer(self, slot: int, nbytes: int) -> Array:
        """``[nbytes]`` uint8 to read into."""
        return self._bytes[slot, :nbytes]

    def record(self, slot: int, nbytes: int) -> Tensor:
        """``[nbytes]`` uint8 to compute from, on the same memory."""
        return self._tensors[slot] if nbytes == self.nbytes else self._tensors[slot][:nbytes]
