"""Drives a cache as the engine does, checking its rules after every move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from collegium.catalog import methods
from collegium.offload.cache import ExpertCache, Found
from collegium.offload.events import EventLog
from collegium.offload.geometry import Array, Geometry
from collegium.offload.policies import Use, find_policy
from collegium.offload.policies.opt import OPT, Stream

VARIANTS = [
    "lru:scope=global",
    "lfu:half_life=inf",
    "lfu:scope=global",
    "arc:scope=global",
    "hybrimoe:scope=global",
    "hobbit:scope=global",
    "edgemoe:printed=true",
    "edgemoe:scope=layer",
    "moe_infinity:past=2",
    "fate:shallow=2",
    "expertflow:window=2",
    "opt:scope=global",
]
POLICIES = [method.name for method in methods("cache")] + VARIANTS


def use(
    geometry: Geometry,
    layer: int,
    experts: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    exact: Sequence[bool] | None = None,
    probabilities: Sequence[float] | None = None,
) -> Use:
    """One token's step, largest weight first."""
    n = len(experts)
    return Use(
        layer=layer,
        experts=np.array(experts, np.int64),
        weights=np.array(weights if weights is not None else np.linspace(1, 0.5, n), np.float32),
        counts=np.ones(n, np.int64),
        exact=np.array(exact if exact is not None else [True] * n),
        probabilities=None if probabilities is None else np.array(probabilities, np.float32),
        tokens=1,
    )


def stream_of(geometry: Geometry, steps: Iterable[tuple[int, Sequence[int]]]) -> Stream:
    """The requests of these steps."""
    keys = [geometry.offsets[layer] + np.array(experts) for layer, experts in steps]
    lengths = [len(part) for part in keys]
    empty = np.zeros(0, np.int64)
    return Stream(np.concatenate(keys) if keys else empty, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


@dataclass
class Drive:
    """A cache with its loads: those numbered in `failing` do not come."""

    cache: ExpertCache
    failing: set[int]
    log: EventLog = field(default_factory=EventLog)
    flying: list[tuple[int, int]] = field(default_factory=list)
    steps: int = 0
    loads: int = 0

    @classmethod
    def of(
        cls,
        name: str,
        geometry: Geometry,
        capacity: int,
        steps: Sequence[tuple[int, Sequence[int]]],
        failing: set[int] | None = None,
    ) -> Drive:
        settings = find_policy(name)
        if isinstance(settings, OPT):
            settings = settings.knowing(stream_of(geometry, steps))
        return cls(ExpertCache(geometry, capacity, settings.build(geometry, capacity)), failing or set())

    def step(self, layer: int, experts: Sequence[int], ahead: Sequence[tuple[int, int]] = ()) -> None:
        """Ask, read ahead, compute, tell; as the engine does. Half of what was read ahead has come by then."""
        cache, geometry = self.cache, self.cache.geometry
        left, served = np.array(experts, np.int64), set()
        held: list[int] = []
        first = True
        while len(left) or held:
            before = cache.slot.copy()
            fixed = self._keys([*self.flying, *((layer, expert) for expert in held)])
            request = cache.request(layer, left) if len(left) else None
            if request is not None:
                left = request.left
                self._check(before, fixed)
                self.log.add(self.steps, request, 16, 1000)
                for expert, found in zip(request.experts.tolist(), request.found.tolist(), strict=True):
                    if found == Found.LATE:
                        self.flying.remove((layer, expert))
                    served.add(expert)
                    if found in (Found.HIT, Found.PREFETCHED) or self._load(layer, expert):
                        held.append(expert)
                assert held or not len(left), "a step is stuck"
            if first:
                self._read_ahead(ahead)
                first = False
            # with experts waiting for slots, one at a time
            done = held[:1] if len(left) else held[:]
            held = held[len(done) :]
            cache.release(layer, np.array(done))
        assert served == set(experts)
        cache.finish(use(geometry, layer, experts))
        self.steps += 1

    def _load(self, layer: int, expert: int) -> bool:
        """A demand load comes; one that fails is tried again, and then comes. False where no slot was left for that."""
        self.loads += 1
        if self.loads in self.failing:
            self.cache.failed(layer, expert)
            assert not self.cache.is_resident(layer)[expert]
            again = self.cache.request(layer, np.array([expert]))
            if not len(again.experts):  # the layer's quota has shrunk below what it holds
                return False
            assert again.found.tolist() == [Found.MISS]
        self.cache.arrived(layer, expert)
        assert self.cache.is_ready(layer)[expert]
        return True

    def _read_ahead(self, wanted: Sequence[tuple[int, int]]) -> None:
        for layer, expert in wanted:
            before, flying = self.cache.slot.copy(), self._keys(self.flying)
            if self.cache.prefetch(layer, expert) is not None:
                self.flying.append((layer, expert))
            self._check(before, flying)
        for layer, expert in self.flying[::2]:
            self.loads += 1
            if self.loads in self.failing:
                self.cache.failed(layer, expert)
            else:
                self.cache.arrived(layer, expert)
        self.flying = self.flying[1::2]

    def _keys(self, pairs: Iterable[tuple[int, int]]) -> list[int]:
        return [int(self.cache.geometry.offsets[layer]) + expert for layer, expert in pairs]

    def _check(self, before: Array, fixed: list[int]) -> None:
        """Slots are counted right, none is given twice, and what must not leave has not moved."""
        cache = self.cache
        slots = cache.slot[cache.slot >= 0]
        assert len(slots) <= cache.capacity
        assert len(np.unique(slots)) == len(slots)
        assert cache.peak <= cache.capacity
        assert (cache.slot[fixed] == before[fixed]).all()
        quotas = cache.policy.quotas()
        if quotas is not None:
            assert quotas.min() >= 1
            assert quotas.sum() <= cache.capacity
