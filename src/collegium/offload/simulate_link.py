"""`Link`: the way from the disk to memory: readers that hand reads to a disk, which serves them one after another.

Each reader has one read at a time. What the disk needs before bytes come passes for all readers at once, so that where
several wait the disk never rests; bytes come one read after another, in the order in which reads began. Demand goes
before what is read ahead; a read that has begun is never given up.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

__all__ = ["Link", "Read"]


@dataclass(eq=False)
class Read:
    """One read.

    Attributes:
        pool: bits of the pool it goes to.
        layer, expert: what is read.
        seconds: that its bytes take on the link.
        ahead: nobody has asked for it yet.
        submitted, end: when it was asked for, and when it will have come, once it has begun.
    """

    pool: int
    layer: int
    expert: int
    seconds: float
    ahead: bool
    submitted: float
    end: float | None = None


class Link:
    """Reads that wait for a reader, and those that have begun.

    Args:
        readers: reads that are under way at once.
        delay: seconds from a read's beginning until its first byte comes, if no other read is on the link then.

    Attributes:
        busy: seconds that bytes of reads that have come took.
    """

    def __init__(self, readers: int = 1, delay: float = 0.0) -> None:
        self.busy = 0.0
        self._delay = delay
        self._demand: deque[Read] = deque()
        self._ahead: deque[Read] = deque()
        self._begun: deque[Read] = deque()  # in the order in which they end
        self._readers = [0.0] * readers  # a heap: when each is free
        self._free_at = 0.0  # when the bytes of all reads that have begun have come
        self._holds: deque[tuple[float, float]] = deque()

    def submit(self, read: Read) -> None:
        """Queue a read; the caller has advanced the link to this moment."""
        (self._ahead if read.ahead else self._demand).append(read)

    def hurry(self, read: Read) -> None:
        """A read ahead is asked for now."""
        read.ahead = False
        if read.end is None and read in self._ahead:
            self._ahead.remove(read)
            self._demand.append(read)

    def call_off(self, layer: int) -> list[Read]:
        """Forget the reads ahead for a layer that have not begun; those it forgot."""
        found = [read for read in self._ahead if read.layer == layer]
        for read in found:
            self._ahead.remove(read)
        return found

    def hold(self, start: float, end: float) -> None:
        """No read begins between these moments, the last ones of which the link has heard: no processor is free."""
        if end > start:
            self._holds.append((start, end))

    def advance(self, now: float) -> list[Read]:
        """What has come until this moment."""
        came = []
        self._begin(now)
        while self._begun and self._end_of_first() <= now:
            came.append(self._finish())
        while self._holds and self._holds[0][1] <= now:
            self._holds.popleft()
        return came

    def next(self) -> Read:
        """The read that comes next, as if nothing else were submitted before that."""
        if not self._begun:
            self._begin(math.inf, most=1)
        return self._finish()

    def _begin(self, until: float, most: int | None = None) -> None:
        """Let the reads begin whose turn comes until that moment, or so many of them."""
        while most is None or most > 0:
            queue = self._demand or self._ahead
            if not queue:
                return
            start = max(self._readers[0], queue[0].submitted)
            for first, last in self._holds:
                if first <= start < last:
                    start = last
            if start > until:
                return
            read = queue.popleft()
            read.end = self._free_at = max(start + self._delay, self._free_at) + read.seconds
            heapq.heapreplace(self._readers, read.end)
            self._begun.append(read)
            most = None if most is None else most - 1

    def _end_of_first(self) -> float:
        end = self._begun[0].end
        assert end is not None
        return end

    def _finish(self) -> Read:
        read = self._begun.popleft()
        self.busy += read.seconds
        return read
