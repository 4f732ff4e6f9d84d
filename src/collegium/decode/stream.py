"""`Stream`: the caller's end of a running request."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

from collegium.decode.request import Event, Request

__all__ = ["Stream"]


class Stream:
    """Events of one request, to iterate over in any one thread, or given to `sink` as they come.

    Iterating raises the error of a request that failed. At most one event per token of the context is ever waiting.

    Attributes:
        id: number of the request in its batcher.
        request: what was asked.
        generated: tokens generated so far.
        cancelled: nobody waits for this any more.
    """

    def __init__(
        self, number: int, request: Request, sink: Callable[[Event], None] | None, wake: Callable[[Stream], None]
    ) -> None:
        self.id = number
        self.request = request
        self.generated = 0
        self.cancelled = False
        self._wake = wake
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._sink = sink or self._events.put

    def cancel(self) -> None:
        """Give the request up: its place in the queue is free at once, its place in the batch at the next step."""
        self.cancelled = True
        self._wake(self)

    def send(self, event: Event) -> None:
        """Called by the batcher. A sink that raises has nobody behind it: the request is given up."""
        try:
            self._sink(event)
        except Exception:
            self.cancelled = True

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            if event.error is not None:
                raise event.error
            yield event
            if event.finish is not None:
                return

    def text(self) -> str:
        """Wait for the end; the whole text. Raises what the request failed with."""
        return "".join(event.text for event in self)
