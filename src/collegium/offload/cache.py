"""`ExpertCache`: which experts have a slot, and what happens when a step asks for some.

Shared by the simulator and the engine, so that what is simulated is what runs: both call `request`, load what it says,
report arrivals, and call `finish`. It moves no bytes and knows no time.

Legend: L layers, E experts of a layer, C slots, n experts of a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.policies.base import CachePolicy, Use

__all__ = ["ExpertCache", "Found", "Request"]

_ABSENT, _LOADING, _READY = range(3)


class Found(IntEnum):
    """Where a requested expert was."""

    HIT = 0  # resident, and used before or loaded on demand
    PREFETCHED = 1  # resident because it was prefetched; its first use
    LATE = 2  # still being prefetched when it was asked for
    MISS = 3  # had to be loaded on demand
    SKIP = 4  # left out by a precision policy; never asked for


@dataclass(frozen=True, eq=False)
class Request:
    """The experts of a step that have slots now and stay until they are released.

    Attributes:
        experts: ``[n]`` ids within the layer: residents first, then those on their way, then misses; within each
            group as they were asked for.
        found: ``[n]`` `Found`.
        slots: ``[n]`` of each.
        evicted: ``[n]`` key that gave up the slot, -1 where it was free or the expert was there.
        left: ids that did not fit beside these; ask again after the release.
    """

    layer: int
    experts: Array
    found: Array
    slots: Array
    evicted: Array
    left: Array


# plain numbers: looking a member up in its class costs more than the rest of a request's row
_HIT, _PREFETCHED, _LATE, _MISS = (int(kind) for kind in (Found.HIT, Found.PREFETCHED, Found.LATE, Found.MISS))
_NONE = np.zeros(0, np.int64)


class ExpertCache:
    """C slots for the experts of all layers.

    Args:
        geometry: of the model.
        capacity: C.
        policy: chooses who leaves; made for the same geometry and capacity.

    Attributes:
        slot: ``[total]`` slot of each key, -1 without one.
        peak: most slots ever in use.

    Raises:
        ConfigError: there is no slot, or quotas do not fit the capacity.
    """

    def __init__(self, geometry: Geometry, capacity: int, policy: CachePolicy) -> None:
        if capacity < 1:
            raise ConfigError(f"a cache of {capacity} slots cannot hold an expert")
        self.geometry, self.capacity, self.policy = geometry, capacity, policy
        self.slot = np.full(geometry.total, -1, np.int64)
        self.peak = 0
        self._first = geometry.offsets.tolist()
        self._keys = [geometry.keys(layer) for layer in range(geometry.num_layers)]
        self._layer_of = geometry.layer_of.tolist()
        self._state = np.zeros(geometry.total, np.int8)
        self._fresh = np.zeros(geometry.total, np.bool_)
        self._ahead = np.zeros(geometry.total, np.bool_)  # a prefetch in flight
        self._pinned = np.zeros(geometry.total, np.bool_)
        self._free = list(range(capacity - 1, -1, -1))
        self._held = np.zeros(geometry.num_layers, np.int64)
        self._coming = np.zeros(geometry.num_layers, np.int64)  # prefetches in flight, by layer
        self._check_quotas()

    def _check_quotas(self) -> None:
        quotas = self.policy.quotas()
        if quotas is not None and (quotas.min() < 1 or quotas.sum() > self.capacity):
            raise ConfigError(f"quotas {quotas.tolist()} must be at least 1 and in all at most {self.capacity} slots")

    def is_resident(self, layer: int) -> Array:
        """``[E]`` bool: loaded, or on its way."""
        return self._state[self.geometry.keys(layer)] != _ABSENT

    def is_ready(self, layer: int) -> Array:
        """``[E]`` bool: loaded."""
        return self._state[self.geometry.keys(layer)] == _READY

    def request(self, layer: int, experts: Array) -> Request:
        """Give slots to as many of the experts of a step as fit, and pin them.

        All are looked up before any victim is chosen. Resident ones and those on their way always fit. Where a step has
        more experts than slots, nothing may fit until some are released: the request is then empty, and the caller
        computes and releases the experts it holds, in the order of their requests, asking again as some are released.

        Args:
            experts: ``[m]`` distinct ids within the layer, the most important first; at least one.
        """
        keys = self._first[layer] + experts
        states = self._state[keys].tolist()
        ids = experts.tolist()
        absent = [at for at, state in enumerate(states) if state == _ABSENT]
        found, slots, evicted, taken = [], [], [], []
        if len(absent) < len(ids):
            self._pinned[keys[[at for at, state in enumerate(states) if state != _ABSENT]]] = True
        for wanted in (_READY, _LOADING):
            for at, state in enumerate(states):
                if state != wanted:
                    continue
                key = keys[at]
                found.append(_LATE if state == _LOADING else _PREFETCHED if self._fresh[key] else _HIT)
                self._fresh[key] = False
                slots.append(self.slot[key])
                evicted.append(-1)
                taken.append(ids[at])
        placed = 0
        for at in absent:
            place = self._place(layer, int(keys[at]), prefetched=False)
            if place is None:
                break
            placed += 1
            found.append(_MISS)
            slots.append(place[0])
            evicted.append(place[1])
            taken.append(ids[at])
        return Request(
            layer=layer,
            experts=np.array(taken, np.int64),
            found=np.array(found, np.uint8),
            slots=np.array(slots, np.int64),
            evicted=np.array(evicted, np.int64),
            left=experts[absent[placed:]] if absent else _NONE,
        )

    def hits(self, layer: int, experts: list[int]) -> list[int] | None:
        """The slots of experts of a step that would all be hits, as `request` without anything to decide; None, and
        nothing changes, if one would not. They are not pinned: nobody may ask for another before they are computed."""
        keys = [self._first[layer] + expert for expert in experts]
        if any(self._state[key] != _READY or self._fresh[key] for key in keys):
            return None
        return [int(self.slot[key]) for key in keys]

    def release(self, layer: int, experts: Array) -> None:
        """These experts of a step were computed; they may leave again."""
        self._pinned[self._first[layer] + experts] = False

    def finish(self, use: Use) -> None:
        """The step is over: tell the policy what it used."""
        self.policy.used(use)

    def prefetch(self, layer: int, expert: int, lender: int | None = None) -> tuple[int, int] | None:
        """Give a slot to an expert that nobody asked for yet.

        Args:
            lender: a layer whose step is over in this pass; one of its experts gives up a slot if none is free, and the
                share of `layer` does not matter.

        Returns:
            ``(slot, evicted key or -1)``; None where it is resident already, where the lender has nothing to give, or,
            without one, where taking a slot would leave the layer too few that a demand can claim.
        """
        key = self._first[layer] + expert
        if self._state[key] != _ABSENT:
            return None
        if lender is not None:
            return self._place(layer, key, prefetched=True, lender=lender)
        if self._coming[layer] + self.geometry.top_k[layer] >= self._share(layer):
            return None
        if self.policy.quotas() is None and self._coming.sum() + max(self.geometry.top_k) >= self.capacity:
            return None
        return self._place(layer, key, prefetched=True)

    def arrived(self, layer: int, expert: int) -> None:
        """The bytes of an expert are in its slot."""
        key = self._first[layer] + expert
        self._landed(key)
        self._state[key] = _READY

    def failed(self, layer: int, expert: int) -> None:
        """The bytes of an expert did not come, or a prefetch was called off: its slot is free again."""
        self._drop(self._first[layer] + expert)

    def _share(self, layer: int) -> int:
        quotas = self.policy.quotas()
        return self.capacity if quotas is None else int(quotas[layer])

    def _place(self, layer: int, key: int, prefetched: bool, lender: int | None = None) -> tuple[int, int] | None:
        """``(slot, evicted key or -1)``, or None where nobody can leave."""
        quotas, evicted = self.policy.quotas(), -1
        full = lender is None and quotas is not None and self._held[layer] >= quotas[layer]
        if full or not self._free:
            candidates = self._candidates(layer, quotas, full) if lender is None else self._idle(lender)
            if not len(candidates):
                return None
            evicted = self.policy.victim(candidates, key)
            self._drop(evicted)
        slot = self._free.pop()
        self.slot[key], self._state[key] = slot, _LOADING
        self._held[layer] += 1
        if prefetched:
            self._fresh[key] = self._ahead[key] = True
            self._coming[layer] += 1
        else:
            self._pinned[key] = True
        self.peak = max(self.peak, self.capacity - len(self._free))
        self.policy.admitted(key, prefetched)
        return slot, evicted

    def _candidates(self, layer: int, quotas: Array | None, full: bool) -> Array:
        """Keys that may leave for one of `layer`: loaded and not pinned, of the layer itself where it has its share,
        else of layers that have more than theirs, or of any where those have nothing to give."""
        if full:
            return self._idle(layer)
        ready = (self._state == _READY) > self._pinned
        if quotas is not None:
            over = ready & (self._held > quotas)[self.geometry.layer_of]
            # quotas may have moved while all that is now over them is on its way; a demand must not be stuck for that
            ready = over if over.any() else ready
        return np.flatnonzero(ready)

    def _idle(self, layer: int) -> Array:
        """Keys of a layer that are loaded and not pinned."""
        keys = self._keys[layer]
        return ((self._state[keys] == _READY) > self._pinned[keys]).nonzero()[0] + keys.start

    def _drop(self, key: int) -> None:
        self._landed(key)
        self._free.append(int(self.slot[key]))
        self._held[self._layer_of[key]] -= 1
        self.slot[key], self._state[key] = -1, _ABSENT
        self._fresh[key] = self._pinned[key] = False
        self.policy.evicted(key)

    def _landed(self, key: int) -> None:
        """A prefetch of this key, if there is one, is in flight no longer."""
        if self._ahead[key]:
            self._ahead[key] = False
            self._coming[self.geometry.layer_of[key]] -= 1
