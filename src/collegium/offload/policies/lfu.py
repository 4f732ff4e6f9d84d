"""LFU with decay: the expert used least often leaves, where a use counts for less the longer ago it was.

The score is the sum over past steps of ``2 ** -(age / half_life)``, with ages in steps of the expert's layer. It is
kept as a logarithm relative to step 0, ``log2 sum 2 ** (step / half_life)``, which has the same order at every moment
and needs no work for experts that are not used. Counts outlive evictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.policies.base import CachePolicy, PolicySettings, Scope, ScoredPolicy, Use, quotas_of

__all__ = ["LFU"]


@method("lfu", kind="cache", paper="LRFU (2001); frequency-weighted LRU of experts in vLLM's offloading")
@dataclass(frozen=True)
class LFU(PolicySettings):
    """Least frequently used, recent uses counting more. A pass counts once, however many of its tokens ask.

    Attributes:
        half_life: steps of a layer after which a use counts half; inf is plain LFU.
        scope: "layer": each layer has an even share of the slots; "global": one pool.
    """

    half_life: float = 32.0
    scope: Scope = "layer"

    def build(self, geometry: Geometry, capacity: int) -> CachePolicy:
        if not self.half_life > 0:
            raise ConfigError(f"lfu: half_life must be above 0 steps (inf: no decay), not {self.half_life}")
        return _LFU(geometry, capacity, quotas_of(self.scope, geometry, capacity), self.half_life)


class _LFU(ScoredPolicy):
    def __init__(self, geometry: Geometry, capacity: int, quotas: Array | None, half_life: float) -> None:
        super().__init__(geometry, capacity, quotas)
        self.score[:] = -np.inf
        self._half_life = half_life
        self._steps = np.zeros(geometry.num_layers, np.int64)

    def used(self, use: Use) -> None:
        super().used(use)
        keys = self.geometry.offsets[use.layer] + use.experts
        self.score[keys] = np.logaddexp2(self.score[keys], self._steps[use.layer] / self._half_life)
        self._steps[use.layer] += 1
