"""OPT (Belady's MIN): the expert whose next use is farthest in the future leaves.

It knows every request to come, so it exists in the simulator only. With experts of one size and no reading ahead no
policy of the same scope has fewer misses; with several precisions or with prefetching it is a reference, not a bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.policies.base import CachePolicy, Need, PolicySettings, Scope, ScoredPolicy, Use, quotas_of

__all__ = ["OPT", "Stream"]

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class Stream:
    """The requests of a whole run, step by step.

    Attributes:
        keys: ``[R]`` requested keys, each once a step.
        starts: ``[S + 1]``: step s requests ``keys[starts[s]:starts[s + 1]]``, most important first.
    """

    keys: Array
    starts: Array

    def next_uses(self, total: int) -> tuple[Array, Array]:
        """``([R] step at which each request's key is requested next, [total] step of each key's first request)``; never
        is the largest int64."""
        step = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        order = np.argsort(self.keys, kind="stable")
        following = np.full(len(self.keys), _NEVER)
        same = self.keys[order[1:]] == self.keys[order[:-1]]
        following[order[:-1][same]] = step[order[1:][same]]
        first = np.full(total, _NEVER)
        np.minimum.at(first, self.keys, step)
        return following, first


@method("opt", kind="cache", paper="Belady (1966); MIN, for experts in Not All Models Suit Expert Offloading (2025)")
@dataclass(frozen=True)
class OPT(PolicySettings):
    """Belady's optimum, an oracle: `knowing` tells it the future.

    Attributes:
        scope: "layer": each layer has an even share of the slots; "global": one pool.
    """

    scope: Scope = "layer"

    def knowing(self, future: Stream) -> PolicySettings:
        """The settings that can be built."""
        return _Knowing(self.scope, future)

    def build(self, geometry: Geometry, capacity: int) -> CachePolicy:
        raise ConfigError("the policy opt must know the requests to come: it works in the simulator only")


@dataclass(frozen=True, eq=False)
class _Knowing(PolicySettings):
    scope: Scope
    future: Stream

    def build(self, geometry: Geometry, capacity: int) -> CachePolicy:
        return _OPT(geometry, capacity, quotas_of(self.scope, geometry, capacity), self.future)


class _OPT(ScoredPolicy):
    needs: ClassVar[frozenset[Need]] = frozenset({"future"})

    def __init__(self, geometry: Geometry, capacity: int, quotas: Array | None, future: Stream) -> None:
        super().__init__(geometry, capacity, quotas)
        self._future = future
        self._following, first = future.next_uses(geometry.total)
        self.score[:] = -first.astype(np.float64)
        self._step = 0

    def used(self, use: Use) -> None:
        super().used(use)
        if self._step + 1 >= len(self._future.starts):
            raise ConfigError("opt was given fewer steps than there are")
        rows = slice(self._future.starts[self._step], self._future.starts[self._step + 1])
        self.score[self._future.keys[rows]] = -self._following[rows].astype(np.float64)
        self._step += 1
