"""ExpertFlow's plan-driven cache: slots go where many different experts are predicted, wrong predictions leave first.

A layer's share of the slots is in proportion to how many of its experts were predicted within the last passes. What is
predicted and not yet used stays; once its layer has run without using it, it is the first to leave; among the rest the
one used longest ago does. Without predictions the shares follow the experts that were used, and the rest is LRU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.policies.base import CachePolicy, Need, PolicySettings, ScoredPolicy, Use, even_quotas, shares

__all__ = ["ExpertFlow"]

_WRONG, _PLAIN, _COMING = -1, 0, 1


@method("expertflow", kind="cache", paper="ExpertFlow (2024)", arxiv="2410.17954")
@dataclass(frozen=True)
class ExpertFlow(PolicySettings):
    """Plan-driven shares.

    Attributes:
        window: passes within which distinct experts are counted.
    """

    window: int = 16

    def build(self, geometry: Geometry, capacity: int) -> CachePolicy:
        if self.window < 1:
            raise ConfigError(f"expertflow: window must be at least 1 pass, not {self.window}")
        return _ExpertFlow(geometry, capacity, self.window)


class _ExpertFlow(ScoredPolicy):
    needs: ClassVar[frozenset[Need]] = frozenset({"predictions"})

    def __init__(self, geometry: Geometry, capacity: int, window: int) -> None:
        super().__init__(geometry, capacity, even_quotas(geometry, capacity))
        self._window = window
        self._pass = window
        # pass at which each expert was predicted, or used, last
        self._predicted, self._used = np.zeros((2, geometry.total), np.int64)
        self._distinct = np.zeros(geometry.num_layers, np.int64)
        self._least = np.ones(geometry.num_layers, np.int64)
        if sum(geometry.top_k) <= capacity:
            self._least = np.array(geometry.top_k)

    def expect(self, layer: int, scores: Array) -> None:
        top = np.argsort(-scores, kind="stable")[: self.geometry.top_k[layer]]
        keys = self.geometry.offsets[layer] + top[scores[top] > -np.inf]
        self.score[self.geometry.keys(layer)] = np.minimum(self.score[self.geometry.keys(layer)], _PLAIN)
        self.score[keys] = _COMING
        self._predicted[keys] = self._pass

    def used(self, use: Use) -> None:
        super().used(use)
        rows = self.geometry.keys(use.layer)
        self.score[rows] = np.where(self.score[rows] == _COMING, _WRONG, self.score[rows])
        self.score[rows][use.experts] = _PLAIN
        self._used[rows][use.experts] = self._pass
        if use.layer + 1 == self.geometry.num_layers:
            self._pass += 1
            self._share()

    def _share(self) -> None:
        since = self._pass - self._window
        seen = self._predicted if (self._predicted >= since).any() else self._used
        distinct = np.add.reduceat((seen >= since).astype(np.int64), self.geometry.offsets[:-1])
        if not np.array_equal(distinct, self._distinct):
            self._distinct = distinct
            self._quotas = shares(np.maximum(distinct, 1), self._least, self.geometry, self.capacity)
