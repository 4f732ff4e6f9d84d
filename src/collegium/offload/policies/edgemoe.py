"""EdgeMoE: experts that are used often and whose layer runs soon stay.

With f the uses of an expert and dist the layers until its layer runs, ``(l - i) mod L`` and L for the layer i that runs
now, the expert with the least ``f / dist`` leaves. The paper's formula has ``(L - l + i) mod L`` in the denominator,
which is the distance since the layer ran last and ranks the other way round than its text; `printed` follows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collegium.catalog import method
from collegium.offload.geometry import Array, Geometry
from collegium.offload.policies.base import CachePolicy, PolicySettings, Scope, ScoredPolicy, Use, quotas_of

__all__ = ["EdgeMoE", "distance"]


def distance(layer: Array, now: int, layers: int, printed: bool = False) -> Array:
    """Layers until each of `layer` runs, 1 to L, while layer `now` runs; `printed`: layers since it ran."""
    apart = (now - layer if printed else layer - now) % layers
    return np.where(apart == 0, layers, apart)


@method("edgemoe", kind="cache", paper="EdgeMoE (2023)", arxiv="2308.14352")
@dataclass(frozen=True)
class EdgeMoE(PolicySettings):
    """Frequency over distance.

    Attributes:
        printed: take the distance as the paper prints it instead of as it describes it.
        scope: "global": one pool, where the distance matters; "layer": each layer has an even share of the slots.
    """

    printed: bool = False
    scope: Scope = "global"

    def build(self, geometry: Geometry, capacity: int) -> CachePolicy:
        return _EdgeMoE(geometry, capacity, quotas_of(self.scope, geometry, capacity), self.printed)


class _EdgeMoE(ScoredPolicy):
    """`score` is f."""

    def __init__(self, geometry: Geometry, capacity: int, quotas: Array | None, printed: bool) -> None:
        super().__init__(geometry, capacity, quotas)
        self._printed = printed
        self._now = 0

    def used(self, use: Use) -> None:
        super().used(use)
        self.score[self.geometry.offsets[use.layer] + use.experts] += use.counts
        self._now = (use.layer + 1) % self.geometry.num_layers

    def worth(self, candidates: Array, incoming: int) -> Array:
        geometry = self.geometry
        return self.score[candidates] / distance(
            geometry.layer_of[candidates], self._now, geometry.num_layers, self._printed
        )
