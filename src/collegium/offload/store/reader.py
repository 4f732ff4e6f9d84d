"""`ReadQueue`: a few threads that read experts, what is needed now before what may be needed.

A disk gives its full rate only to several reads at once, and a read must not stop the thread that computes. Reads let
go of the GIL, so threads are enough.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from collegium.errors import ConfigError
from collegium.offload.store.source import Bytes, ExpertSource

__all__ = ["DEMAND", "PREFETCH", "ReadCounters", "ReadQueue", "Ticket"]

DEMAND, PREFETCH = 0, 1
"""Priorities: somebody waits for it; nobody does yet. Within one, first come first served."""


class Ticket:
    """One read that was asked for.

    Attributes:
        layer, expert, bits, into: what is read, and where to. `into` belongs to the queue until `done` is set.
        priority: `DEMAND` or `PREFETCH`.
        done: set when the read has ended, well or badly, or was cancelled.
        error: why it failed; None if it did not.
        cancelled: it was never begun.
        seconds: how long the read took, without the time it waited.
    """

    __slots__ = ("bits", "callback", "cancelled", "done", "error", "expert", "into", "layer", "priority", "seconds")

    def __init__(
        self,
        layer: int,
        expert: int,
        bits: int,
        into: Bytes,
        priority: int,
        callback: Callable[[Ticket], None] | None,
    ) -> None:
        self.layer, self.expert, self.bits, self.into = layer, expert, bits, into
        self.priority, self.callback = priority, callback
        self.done = threading.Event()
        self.error: Exception | None = None
        self.cancelled = False
        self.seconds = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until `done`, at most so many seconds; whether it is. Raises nothing: look at `error`."""
        return self.done.wait(timeout)


@dataclass(frozen=True)
class ReadCounters:
    """What a queue did.

    Attributes:
        bytes, seconds: of reads that went well; seconds add up over threads.
        demand, prefetch: reads begun, by the priority they were begun with.
        failed, cancelled, promoted: how many tickets met that end.
        waiting, reading: tickets there now.
    """

    bytes: int = 0
    seconds: float = 0.0
    demand: int = 0
    prefetch: int = 0
    failed: int = 0
    cancelled: int = 0
    promoted: int = 0
    waiting: int = 0
    reading: int = 0


class ReadQueue:
    """Threads that read from `source`. It does not own the source: close the queue first, then the source.

    Args:
        threads: reads at once; also an attribute.

    Raises:
        ConfigError: there is no thread.
    """

    def __init__(self, source: ExpertSource, threads: int = 3) -> None:
        if threads < 1:
            raise ConfigError(f"{threads} threads cannot read; use at least 1")
        self._source = source
        self._waiting: tuple[dict[Ticket, None], dict[Ticket, None]] = ({}, {})
        self._counters = ReadCounters()
        self._closed = False
        self.threads = threads
        self._wake = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"expert-reader-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        layer: int,
        expert: int,
        bits: int,
        into: Bytes,
        priority: int = DEMAND,
        callback: Callable[[Ticket], None] | None = None,
    ) -> Ticket:
        """Ask for a record (see `ExpertSource.read`).

        Args:
            callback: called by the thread that read, before ``ticket.done`` is set; not for a cancelled ticket.

        Raises:
            ConfigError: the queue is closed, or there is no such priority.
        """
        if priority not in (DEMAND, PREFETCH):
            raise ConfigError(f"a read's priority is {DEMAND} (demand) or {PREFETCH} (prefetch), not {priority}")
        ticket = Ticket(layer, expert, bits, into, priority, callback)
        with self._wake:
            if self._closed:
                raise ConfigError("the read queue is closed; nothing can be read any more")
            self._waiting[priority][ticket] = None
            self._wake.notify()
        return ticket

    def promote(self, ticket: Ticket) -> bool:
        """Make a demand load of a prefetch that still waits; whether it did."""
        with self._wake:
            if ticket not in self._waiting[PREFETCH]:
                return False
            del self._waiting[PREFETCH][ticket]
            ticket.priority = DEMAND
            self._waiting[DEMAND][ticket] = None
            self._count(promoted=1)
        return True

    def cancel(self, ticket: Ticket) -> bool:
        """Take back a ticket that still waits; whether it could. Then `into` is free at once."""
        with self._wake:
            if ticket not in self._waiting[ticket.priority]:
                return False
            del self._waiting[ticket.priority][ticket]
            ticket.cancelled = True
            self._count(cancelled=1)
        ticket.done.set()
        return True

    def counters(self) -> ReadCounters:
        """What was done until now."""
        with self._wake:
            return replace(self._counters, waiting=sum(map(len, self._waiting)))

    def close(self) -> None:
        """End: reads under way are finished, tickets that wait fail with a ConfigError, threads are joined."""
        with self._wake:
            self._closed = True
            left = [ticket for queue in self._waiting for ticket in queue]
            for queue in self._waiting:
                queue.clear()
            self._wake.notify_all()
        for ticket in left:
            ticket.error = ConfigError("the read queue was closed before this read began")
            self._finish(ticket, reading=0)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (ticket := self._next()) is not None:
            start = time.perf_counter()
            try:
                self._source.read(ticket.layer, ticket.expert, ticket.bits, ticket.into)
            except Exception as error:  # whatever it is, it is for who asked, and the next read goes on
                ticket.error = error
            ticket.seconds = time.perf_counter() - start
            self._finish(ticket, reading=-1)

    def _next(self) -> Ticket | None:
        """The ticket whose turn it is; None when the queue is closed."""
        with self._wake:
            while not self._closed:
                for queue in self._waiting:
                    if queue:
                        ticket = next(iter(queue))
                        del queue[ticket]
                        demand = ticket.priority == DEMAND
                        self._count(demand=int(demand), prefetch=int(not demand), reading=1)
                        return ticket
                self._wake.wait()
        return None

    def _finish(self, ticket: Ticket, reading: int) -> None:
        if ticket.callback is not None:
            try:
                ticket.callback(ticket)
            except Exception as error:  # a thread that died of it would leave the others to do its work
                ticket.error = ticket.error or error
        with self._wake:
            good = ticket.error is None
            self._count(
                bytes=ticket.into.nbytes if good else 0,
                seconds=ticket.seconds if good else 0.0,
                failed=int(not good),
                reading=reading,
            )
        ticket.done.set()

    def _count(self, **more: float) -> None:
        """Add to the counters; the lock is held."""
        self._counters = replace(
            self._counters, **{name: getattr(self._counters, name) + value for name, value in more.items()}
        )
