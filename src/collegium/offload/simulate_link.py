"""`Link`: the way from the disk to memory, as one server that reads one expert at a time.

Demand goes before what is read ahead; a read that has begun is never given up.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

__all__ = ["Link", "Read"]


@dataclass(eq=False)
class Read:
    """One read.

    Attributes:
        pool: bits of the pool it goes to.
        layer, expert: what is read.
        seconds: that it takes on the link.
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
    """The queue in front of the server, and the read that is under way.

    Attributes:
        busy: seconds that it was occupied by reads that have come.
    """

    def __init__(self) -> None:
        self.busy = 0.0
        self._demand: deque[Read] = deque()
        self._ahead: deque[Read] = deque()
        self._current: Read | None = None
        self._free_at = 0.0

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

    def advance(self, now: float) -> list[Read]:
        """What has come until this moment."""
        came = []
        while self._begin() and self._current is not None and self._current.end is not None:
            if self._current.end > now:
                break
            came.append(self._finish())
        return came

    def next(self) -> Read:
        """The read that comes next, as if nothing else were submitted before that."""
        self._begin()
        return self._finish()

    def _begin(self) -> bool:
        """Whether a read is under way, having begun one if one waits."""
        if self._current is None:
            queue = self._demand or self._ahead
            if not queue:
                return False
            read = queue.popleft()
            read.end = max(self._free_at, read.submitted) + read.seconds
            self._current = read
        return True

    def _finish(self) -> Read:
        read = self._current
        assert read is not None
        assert read.end is not None
        self._current, self._free_at = None, read.end
        self.busy += read.seconds
        return read
