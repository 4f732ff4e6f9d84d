"""`Geometry`: the MoE layers of a model, counted from 0 in the order they run, and one number for every expert.

A *key* is that number: the experts of layer 0 come first. Policies, predictors, the simulator and the engine speak of
experts by key only; whether a key's weights lie on a disk or in the memory of a host is the store's business.

Legend: L MoE layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from collegium.errors import ConfigError

if TYPE_CHECKING:
    from collegium.trace.schema import TraceMeta

__all__ = ["Array", "Geometry"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Geometry:
    """Shape of what is cached.

    Attributes:
        experts: E of each layer.
        top_k: slots of a token in each layer.
        layers: number of each one's decoder layer, for people and traces.
    """

    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.experts or not len(self.experts) == len(self.top_k) == len(self.layers):
            raise ConfigError("a geometry has at least one layer, and experts, top_k and a number for each of them")

    @classmethod
    def of_trace(cls, meta: TraceMeta) -> Geometry:
        """The traced layers.

        Raises:
            TraceError: one routes several times in a forward, where an engine serves one routing of a layer.
        """
        meta.need_one_routing("offloading")
        found: Sequence[Any] = meta.layers
        return cls(
            experts=tuple(entry.num_experts for entry in found),
            top_k=tuple(entry.top_k for entry in found),
            layers=tuple(entry.layer for entry in found),
        )

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.experts)

    @cached_property
    def offsets(self) -> Array:
        """``[L + 1]``: the keys of layer l are ``offsets[l] .. offsets[l + 1] - 1``."""
        return np.concatenate([[0], np.cumsum(self.experts)])

    @property
    def total(self) -> int:
        """Keys there are."""
        return int(self.offsets[-1])

    @cached_property
    def layer_of(self) -> Array:
        """``[total]`` layer of each key."""
        return np.repeat(np.arange(self.num_layers), self.experts)

    def keys(self, layer: int) -> slice:
        """The keys of a layer."""
        return slice(int(self.offsets[layer]), int(self.offsets[layer + 1]))

    def split(self, key: int) -> tuple[int, int]:
        """``(layer, expert)`` of a key."""
        layer = int(self.layer_of[key])
        return layer, key - int(self.offsets[layer])
