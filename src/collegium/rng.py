"""Random numbers that replay: every stochastic choice is drawn from a generator keyed by what it is for.

Recomputation (gradient checkpointing) runs a forward twice and must make the same choices both times, so no part
draws from the global generator.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["generator", "seed_of"]


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from any key; equal keys give equal seeds on every machine and Python version."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator for `key`, for example ``(seed, step, micro_batch, layer, "jitter")``."""
    import torch  # here, because traces are read and measured without torch

    return torch.Generator(device=device).manual_seed(seed_of(*key))
