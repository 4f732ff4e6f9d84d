"""ARC: a cache that divides itself between what was used once lately and what was used at least twice.

Lists T1 and T2 hold the residents of the two kinds, B1 and B2 the names of those that left them. A miss whose name is
in B1 says that T1 was too small and raises its target, one in B2 lowers it. This is the batched variant: all experts of
a step are looked up first, those of a step never give way to one another, and lists move after the step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from collegium.catalog import method
from collegium.offload.geometry import Array, Geometry
from collegium.offload.policies.base import CachePolicy, PolicySettings, Scope, Use, quotas_of

__all__ = ["ARC", "ArcPolicy"]


@method("arc", kind="cache", paper="ARC (2003)")
@dataclass(frozen=True)
class ARC(PolicySettings):
    """Adaptive replacement.

    Attributes:
        scope: "layer": each layer has an even share of the slots and lists of its own; "global": one pool.
    """

    scope: Scope = "layer"

    def build(self, geometry: Geometry, capacity: int) -> CachePolicy:
        return ArcPolicy(geometry, capacity, quotas_of(self.scope, geometry, capacity))


class _Lists:
    """The four lists of one pool of `capacity` slots; the end of a list was used last."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.target = 0.0  # of T1
        self.once: OrderedDict[int, None] = OrderedDict()
        self.twice: OrderedDict[int, None] = OrderedDict()
        self.left_once: OrderedDict[int, None] = OrderedDict()
        self.left_twice: OrderedDict[int, None] = OrderedDict()
        self.unused: set[int] = set()  # residents whose step is not over, and prefetched ones

    def adapt(self, key: int) -> None:
        once, twice = len(self.left_once), len(self.left_twice)
        if key in self.left_once:
            self.target = min(float(self.capacity), self.target + max(1.0, twice / once))
        elif key in self.left_twice:
            self.target = max(0.0, self.target - max(1.0, once / twice))

    def victim(self, candidates: Sequence[int], incoming: int) -> int:
        allowed = set(candidates)
        size = len(self.once)
        from_once = size > 0 and (size > self.target or (size == self.target and incoming in self.left_twice))
        order = (self.once, self.twice) if from_once else (self.twice, self.once)
        return next(key for keys in order for key in keys if key in allowed)

    def admit(self, key: int) -> None:
        known = key in self.left_once or key in self.left_twice
        self.left_once.pop(key, None)
        self.left_twice.pop(key, None)
        (self.twice if known else self.once)[key] = None
        self.unused.add(key)
        self._trim()

    def leave(self, key: int) -> None:
        seen = key not in self.unused
        self.unused.discard(key)
        for residents, left in ((self.once, self.left_once), (self.twice, self.left_twice)):
            if key in residents:
                del residents[key]
                if seen:  # what nobody asked for teaches nothing
                    left[key] = None
        self._trim()

    def use(self, key: int) -> None:
        if key in self.unused:
            self.unused.discard(key)
            (self.once if key in self.once else self.twice).move_to_end(key)
        elif key in self.once or key in self.twice:
            self.once.pop(key, None)
            self.twice[key] = None
            self.twice.move_to_end(key)
        else:  # it came and went within a step that had more experts than slots
            self.left_once[key] = None
            self.left_once.move_to_end(key)
            self.left_twice.pop(key, None)
            self._trim()

    def _trim(self) -> None:
        C = self.capacity
        while self.left_once and len(self.once) + len(self.left_once) > C:
            self.left_once.popitem(last=False)
        while self.left_twice and sum(map(len, (self.once, self.twice, self.left_once, self.left_twice))) > 2 * C:
            self.left_twice.popitem(last=False)


class ArcPolicy(CachePolicy):
    """ARC in one pool, or in one for each layer.

    Args:
        quotas: ``[L]`` slots of each layer, or None for one pool.
    """

    def __init__(self, geometry: Geometry, capacity: int, quotas: Array | None) -> None:
        super().__init__(geometry, capacity)
        self._quotas = quotas
        one = _Lists(capacity)
        self._lists = [one] * geometry.num_layers if quotas is None else [_Lists(int(share)) for share in quotas]
        self._adapted = -1

    def quotas(self) -> Array | None:
        return self._quotas

    def _of(self, key: int) -> _Lists:
        return self._lists[self.geometry.layer_of[key]]

    def victim(self, candidates: Array, incoming: int) -> int:
        self._of(incoming).adapt(incoming)
        self._adapted = incoming
        # a prompt, or a layer above its share, may give a slot to another layer
        return self._of(int(candidates[0])).victim(candidates.tolist(), incoming)

    def admitted(self, key: int, prefetched: bool) -> None:
        lists = self._of(key)
        if self._adapted != key:  # there was a free slot, so no victim was asked for
            lists.adapt(key)
        self._adapted = -1
        lists.admit(key)

    def evicted(self, key: int) -> None:
        self._of(key).leave(key)

    def used(self, use: Use) -> None:
        lists = self._lists[use.layer]
        first = int(self.geometry.offsets[use.layer])
        # as in LRU, of one token's experts the one of the least weight counts as used first
        for expert in use.experts[::-1].tolist():
            lists.use(first + expert)
