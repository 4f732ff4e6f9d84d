"""`CachePolicy`: who leaves when an expert comes into a memory that is full.

One class serves the simulator over a trace and the engine over live tokens. A *step* is one MoE layer of one forward
pass. Its experts are all looked up before any is loaded, loads then choose their victims, and only after that the
policy hears what was used: otherwise an expert could be evicted for another one of the same token.

Most policies keep one number for each expert and give up the least: those are a `ScoredPolicy`.

Legend: L layers, E experts of a layer, C slots of the cache, n distinct experts of a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry

__all__ = [
    "CachePolicy",
    "Need",
    "PolicySettings",
    "Scope",
    "ScoredPolicy",
    "Use",
    "even_quotas",
    "quotas_of",
    "shares",
]

Scope = Literal["layer", "global"]
Need = Literal["probabilities", "future", "predictions"]
"""What a policy asks for: router probabilities of every expert, the requests to come (an oracle: simulator only), or
the scores a predictor gave for coming layers."""


@dataclass(frozen=True, eq=False)
class Use:
    """One step as it happened.

    Attributes:
        layer: which, counted from 0.
        experts: ``[n]`` ids within the layer, each once, largest weight first.
        weights: ``[n]`` sum over tokens of the combine weights.
        counts: ``[n]`` tokens that use each.
        exact: ``[n]`` bool: the copy of high precision was wanted.
        probabilities: ``[E]`` mean over tokens of the router's probabilities, where a policy needs them; else None.
        tokens: tokens of the pass.
    """

    layer: int
    experts: Array
    weights: Array
    counts: Array
    exact: Array
    probabilities: Array | None
    tokens: int


class CachePolicy(ABC):
    """State of one policy over one cache.

    Attributes:
        needs: what it asks for.
        geometry, capacity: of the cache, C in experts.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init__(self, geometry: Geometry, capacity: int) -> None:
        self.geometry, self.capacity = geometry, capacity

    def begin(self) -> None:
        """A new sequence starts; the cache keeps its content."""

    def quotas(self) -> Array | None:
        """``[L]`` slots that each layer may fill, at least 1 and in all at most C; None where all share one pool.
        A policy may change them between steps."""
        return None

    def expect(self, layer: int, scores: Array) -> None:
        """A predictor's scores ``[E]`` for a coming layer; only where `needs` has "predictions"."""

    def admitted(self, key: int, prefetched: bool) -> None:
        """An expert got a slot; its bytes are on their way."""

    def evicted(self, key: int) -> None:
        """An expert lost its slot."""

    @abstractmethod
    def used(self, use: Use) -> None:
        """What a step used. Called once a step, after all of its lookups and evictions."""

    @abstractmethod
    def victim(self, candidates: Array, incoming: int) -> int:
        """Which of ``candidates`` (keys, ascending, at least one) leaves for `incoming`."""


class ScoredPolicy(CachePolicy):
    """The candidate with the least score leaves; of equals, the one used longest ago.

    Attributes:
        score: ``[total]`` float64, what each expert is worth keeping.
        last: ``[total]`` int64, when each was used or admitted last, on a clock that counts these events.
    """

    def __init__(self, geometry: Geometry, capacity: int, quotas: Array | None = None) -> None:
        super().__init__(geometry, capacity)
        self.score = np.zeros(geometry.total)
        self.last = np.zeros(geometry.total, np.int64)
        self._quotas = quotas
        self._clock = 0

    def quotas(self) -> Array | None:
        return self._quotas

    def admitted(self, key: int, prefetched: bool) -> None:
        self._clock += 1
        self.last[key] = self._clock  # what was fetched for a coming step must not look old

    def used(self, use: Use) -> None:
        n = len(use.experts)
        # of one token's experts the one of the least weight counts as used first
        self.last[self.geometry.offsets[use.layer] + use.experts] = np.arange(self._clock + n, self._clock, -1)
        self._clock += n

    def worth(self, candidates: Array, incoming: int) -> Array:
        """``[n]`` scores of these keys now; a policy whose scores depend on the moment computes them here."""
        return self.score[candidates]

    def victim(self, candidates: Array, incoming: int) -> int:
        worth = self.worth(candidates, incoming)
        least = candidates[worth == worth.min()]
        return int(least[0] if len(least) == 1 else least[self.last[least].argmin()])


@dataclass(frozen=True)
class PolicySettings(ABC):
    """Settings of a policy; `build` makes the policy of one cache."""

    @abstractmethod
    def build(self, geometry: Geometry, capacity: int) -> CachePolicy:
        """A policy at its start. Raises ConfigError where the capacity is too small for it."""


def quotas_of(scope: Scope, geometry: Geometry, capacity: int) -> Array | None:
    """Even quotas, or None for one pool. Raises ConfigError as `even_quotas` does."""
    return even_quotas(geometry, capacity) if scope == "layer" else None


def even_quotas(geometry: Geometry, capacity: int) -> Array:
    """``[L]`` shares of C slots as even as can be, none above its layer's E; what is left over goes to early layers.

    Raises:
        ConfigError: there are fewer slots than layers.
    """
    return shares(np.ones(geometry.num_layers), np.ones(geometry.num_layers, np.int64), geometry, capacity)


def shares(demand: Array, least: Array, geometry: Geometry, capacity: int) -> Array:
    """``[L]`` shares of C slots in proportion to a demand, within bounds.

    Args:
        demand: ``[L]``, positive.
        least: ``[L]`` slots that each layer gets whatever its demand; none gets more than its E.

    Raises:
        ConfigError: the least shares do not fit.
    """
    most = np.array(geometry.experts)
    quota = np.minimum(least, most)
    if quota.sum() > capacity:
        raise ConfigError(
            f"{capacity} slots are fewer than the {int(quota.sum())} that {geometry.num_layers} MoE layers need"
        )
    capacity = min(capacity, int(most.sum()))
    # the largest scale at which the shares fit, then single slots to those whose share was rounded down most
    low, high = 0.0, capacity / float(demand.min())
    for _ in range(50):
        scale = (low + high) / 2
        fits = np.clip((demand * scale).astype(np.int64), quota, most).sum() <= capacity
        low, high = (scale, high) if fits else (low, scale)
    found = np.clip((demand * low).astype(np.int64), quota, most)
    while (left := capacity - int(found.sum())) > 0:
        open_layers = np.flatnonzero(found < most)
        order = open_layers[np.argsort(-(demand * high - found)[open_layers], kind="stable")]
        found[order[:left]] += 1
    return found
