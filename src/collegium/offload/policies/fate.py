"""Fate's shares: the first layers whole, where nothing can be predicted yet, and ARC in what is left for the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.policies.arc import ArcPolicy
from collegium.offload.policies.base import CachePolicy, PolicySettings, shares

__all__ = ["Fate"]


@method("fate", kind="cache", paper="Fate (2025)", arxiv="2502.12224")
@dataclass(frozen=True)
class Fate(PolicySettings):
    """Shallow layers resident.

    Attributes:
        shallow: how many of the first layers keep all of their experts; as many fewer as it takes to leave every deeper
            layer slots for one token's experts.
    """

    shallow: int = 1

    def build(self, geometry: Geometry, capacity: int) -> CachePolicy:
        if self.shallow < 0:
            raise ConfigError(f"fate: shallow must be at least 0 layers, not {self.shallow}")
        return ArcPolicy(geometry, capacity, _quotas(geometry, capacity, self.shallow))


def _quotas(geometry: Geometry, capacity: int, shallow: int) -> Array:
    experts, top_k = np.array(geometry.experts), np.array(geometry.top_k)
    whole = min(shallow, geometry.num_layers)
    while whole and experts[:whole].sum() + top_k[whole:].sum() > capacity:
        whole -= 1
    least = np.where(np.arange(geometry.num_layers) < whole, experts, np.ones_like(experts))
    return shares(np.ones(geometry.num_layers), least, geometry, capacity)
