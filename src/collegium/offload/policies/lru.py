"""LRU: the expert used longest ago leaves.

With one pool for all layers this has a known defect: layers run in a cycle, so the expert used longest ago is of the
layer that runs next, and LRU evicts just what is needed soonest once the pool is smaller than a cycle's experts. A
share for each layer (the default) has no such order to get wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

from collegium.catalog import method
from collegium.offload.geometry import Geometry
from collegium.offload.policies.base import CachePolicy, PolicySettings, Scope, ScoredPolicy, quotas_of

__all__ = ["LRU"]


@method("lru", kind="cache", paper="classic; measured for experts in Not All Models Suit Expert Offloading (2025)")
@dataclass(frozen=True)
class LRU(PolicySettings):
    """Least recently used.

    Attributes:
        scope: "layer": each layer has an even share of the slots; "global": one pool.
    """

    scope: Scope = "layer"

    def build(self, geometry: Geometry, capacity: int) -> CachePolicy:
        return _LRU(geometry, capacity, quotas_of(self.scope, geometry, capacity))


class _LRU(ScoredPolicy):
    """All scores are equal, so the last use decides."""
