"""`Pool`: the experts of one precision in memory: which are there, where, and the reads that are under way.

Only the thread that runs the model changes a pool. Reader threads put finished tickets into a queue, which that thread
empties; so no lock is held while a layer computes.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from collegium.offload.cache import ExpertCache, Found, Request
from collegium.offload.geometry import Geometry
from collegium.offload.policies.base import CachePolicy
from collegium.offload.slots import SlotPool
from collegium.offload.store.reader import DEMAND, PREFETCH, ReadQueue, Ticket

__all__ = ["Done", "Pool"]

Done: TypeAlias = "queue.SimpleQueue[tuple[Pool, int, int, Ticket]]"
"""Reads that have ended: pool, layer, expert, ticket."""


class Pool:
    """One cache, its slots, and its reads.

    Args:
        geometry: of the model.
        bits: of the copies it holds.
        sizes: bytes of a record in each layer.
        policy: of the cache; made for its capacity.
        reader: shared by all pools.
        done: where finished reads go; shared by all pools.
    """

    def __init__(
        self,
        geometry: Geometry,
        bits: int,
        sizes: Sequence[int],
        policy: CachePolicy,
        reader: ReadQueue,
        done: Done,
    ) -> None:
        self.bits, self.sizes = bits, sizes
        self.cache = ExpertCache(geometry, policy.capacity, policy)
        self.slots = SlotPool(policy.capacity, max(sizes))
        self._reader, self._done = reader, done
        self._flying: dict[tuple[int, int], Ticket] = {}

    def load(self, request: Request) -> set[int]:
        """Start the reads of a request, or hurry those under way; the experts that are not there yet."""
        waiting = set()
        for expert, found, slot in zip(
            request.experts.tolist(), request.found.tolist(), request.slots.tolist(), strict=True
        ):
            if found == Found.LATE:
                self._reader.promote(self._flying[request.layer, expert])
            elif found == Found.MISS:
                self._submit(request.layer, expert, slot, DEMAND)
            else:
                continue
            waiting.add(expert)
        return waiting

    def prefetch(self, layer: int, expert: int, lender: int | None = None) -> int | None:
        """Start reading an expert that nobody asked for yet; the evicted key or -1, None where it is not to be.
        `lender`: as for `ExpertCache.prefetch`."""
        place = self.cache.prefetch(layer, expert, lender)
        if place is None:
            return None
        self._submit(layer, expert, place[0], PREFETCH)
        return place[1]

    def call_off(self, layer: int) -> int:
        """Cancel the prefetches for `layer` that still wait for their turn: nobody will ask for them now."""
        called_off = 0
        for (of, expert), ticket in list(self._flying.items()):
            if of == layer and ticket.priority == PREFETCH and self._reader.cancel(ticket):
                del self._flying[of, expert]
                self.cache.failed(of, expert)
                called_off += 1
        return called_off

    def record(self, layer: int, slot: int) -> Tensor:
        """The bytes of an expert of `layer` in a slot."""
        return self.slots.record(slot, self.sizes[layer])

    def land(self, layer: int, expert: int, ticket: Ticket) -> None:
        """Take note of a read that has ended."""
        del self._flying[layer, expert]
        if ticket.error is None:
            self.cache.arrived(layer, expert)
        else:
            self.cache.failed(layer, expert)

    @property
    def flying(self) -> int:
        """Reads under way, or waiting."""
        return len(self._flying)

    def _submit(self, layer: int, expert: int, slot: int, priority: int) -> None:
        def done(ticket: Ticket) -> None:
            self._done.put((self, layer, expert, ticket))

        into = self.slots.buffer(slot, self.sizes[layer])
        self._flying[layer, expert] = self._reader.submit(layer, expert, self.bits, into, priority, done)
