"""HOBBIT's mix of four reasons to stay: used lately, used often, wanted exactly, needed soon.

Since the start of the sequence an expert of layer l has R, the token it was used at last, F, how many tokens used it,
and H, how many of them wanted the exact copy. With T tokens so far, L layers, and layer i running, it is worth

    w1 R / T  +  w2 F / T  +  w3 H / T  +  w4 (1 - ((l - i) mod L) / L)

and the least leaves. The last term compares layers, so it does nothing in a pool of one layer. As printed, it is
largest for the layer that runs now, although that one is needed again only after all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.policies.base import CachePolicy, PolicySettings, Scope, ScoredPolicy, Use, quotas_of

__all__ = ["Hobbit"]


@method("hobbit", kind="cache", paper="HOBBIT (2024)", arxiv="2411.01433")
@dataclass(frozen=True)
class Hobbit(PolicySettings):
    """The multidimensional mix. The paper tunes its weights on a trace of calibration tokens; the simulator can.

    Attributes:
        w1, w2, w3, w4: weights of recency, frequency, frequency of exact uses, and nearness of the layer; at least 0,
            they are divided by their sum. (1, 0, 0, 0) is LRU that forgets at the start of a sequence.
        scope: "layer": each layer has an even share of the slots; "global": one pool.
    """

    w1: float = 0.25
    w2: float = 0.25
    w3: float = 0.25
    w4: float = 0.25
    scope: Scope = "layer"

    def build(self, geometry: Geometry, capacity: int) -> CachePolicy:
        weights = np.array([self.w1, self.w2, self.w3, self.w4])
        if not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() == 0:
            raise ConfigError(f"hobbit: the weights must be at least 0 and not all 0, not {weights.tolist()}")
        quotas = quotas_of(self.scope, geometry, capacity)
        return _Hobbit(geometry, capacity, quotas, weights / weights.sum())


class _Hobbit(ScoredPolicy):
    """`score` holds the first three terms times T, so that only used experts change."""

    def __init__(self, geometry: Geometry, capacity: int, quotas: Array | None, weights: Array) -> None:
        super().__init__(geometry, capacity, quotas)
        self._weights = weights
        self._tokens = np.zeros(geometry.num_layers, np.int64)
        self._recent = np.zeros(geometry.total)
        self._counts = np.zeros((2, geometry.total))
        self._now = 0

    def begin(self) -> None:
        self._tokens[:] = 0
        self._recent[:] = self._counts[:] = self.score[:] = 0

    def used(self, use: Use) -> None:
        super().used(use)
        keys = self.geometry.offsets[use.layer] + use.experts
        self._tokens[use.layer] += use.tokens
        self._recent[keys] = self._tokens[use.layer]
        self._counts[0, keys] += use.counts
        self._counts[1, keys] += use.counts * use.exact
        self.score[keys] = self._weights[:3] @ np.stack([self._recent[keys], *self._counts[:, keys]])
        self._now = (use.layer + 1) % self.geometry.num_layers

    def worth(self, candidates: Array, incoming: int) -> Array:
        L = self.geometry.num_layers
        far = (self.geometry.layer_of[candidates] - self._now) % L
        return self.score[candidates] / max(int(self._tokens.max()), 1) + self._weights[3] * (1 - far / L)
