"""A layer of one token whose experts are all in memory, on the shortest way.

While a model writes with its experts in memory, a layer's arithmetic takes as long as some hundred small operations.
What happens is what the engine does in general: the same requests, the same numbers.

Legend: K slots of the token, d model width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from collegium.offload.arithmetic import Arithmetic
from collegium.offload.geometry import Array
from collegium.offload.policies.base import Use
from collegium.offload.pool import Pool

__all__ = ["Resident"]


class Resident:
    """What one token's experts give, where they are all there."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._ones = {
            n: (np.ones(n, np.int64), np.ones(n, np.bool_)) for n in range(1 + max(pool.cache.geometry.top_k))
        }

    def slots(self, layer: int, experts: list[int]) -> list[int] | None:
        """The slots of a token's experts; None if one is not there, or was prefetched and is asked for the first time,
        or is an unused slot."""
        return (
            self._pool.cache.hits(layer, experts) if max(experts) < self._pool.cache.geometry.experts[layer] else None
        )

    def compute(
        self, layer: int, kernel: Arithmetic, x: Tensor, experts: list[int], weights: list[float], slots: list[int]
    ) -> Tensor | None:
        """``[1, d]`` in x's dtype, or None where the arithmetic does no tokens by themselves; x ``[1, d]``."""
        # rows in the order of ids, which is that of the sum
        order = sorted(range(len(experts)), key=experts.__getitem__)
        record = self._pool.record
        groups = [(record(layer, slots[at]), row, row + 1) for row, at in enumerate(order)]
        return kernel.token(x, groups, torch.tensor([weights[at] for at in order]))

    def finish(self, layer: int, experts: list[int], weights: list[float], probabilities: Array | None) -> None:
        """Tell the cache what was used."""
        heaviest: Any = sorted(range(len(experts)), key=lambda at: (-weights[at], experts[at]))
        counts, exact = self._ones[len(experts)]
        self._pool.cache.finish(
            Use(
                layer=layer,
                experts=np.array([experts[at] for at in heaviest], np.int64),
                weights=np.array([weights[at] for at in heaviest], np.float32),
                counts=counts,
                exact=exact,
                probabilities=probabilities,
                tokens=1,
            )
        )
