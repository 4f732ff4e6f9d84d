"""Events of a request in an event loop, for as long as the client is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from starlette.types import Receive

from collegium.decode import Batcher, Event, Request
from collegium.serve.errors import ClientGone

__all__ = ["follow"]


@asynccontextmanager
async def follow(batcher: Batcher, request: Request, receive: Receive) -> AsyncIterator[AsyncIterator[Event]]:
    """Submit `request`; yields its events. However the context is left, the request has ended or is cancelled.

    The events raise what the request failed with, and ClientGone when the client closes the connection.

    Raises:
        FieldError, QueueFullError, BatcherClosedError: see `Batcher.submit`.
    """
    loop = asyncio.get_running_loop()
    # None: the client is gone
    events: asyncio.Queue[Event | None] = asyncio.Queue()
    stream = batcher.submit(request, lambda event: _put(loop, events, event))
    watch = asyncio.ensure_future(_gone(receive))

    def leave(_: asyncio.Future[None]) -> None:
        # not only when the events are read again: whoever sends the answer may have been stopped with the connection
        stream.cancel()
        events.put_nowait(None)

    watch.add_done_callback(leave)
    try:
        async with aclosing(_events(events)) as found:
            yield found
    finally:
        watch.cancel()
        stream.cancel()


def _put(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event | None], event: Event) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)


async def _events(events: asyncio.Queue[Event | None]) -> AsyncGenerator[Event]:
    while True:
        event = await events.get()
        if event is None:
            raise ClientGone
        if event.error is not None:
            raise event.error
        yield event
        if event.finish is not None:
            return


async def _gone(receive: Receive) -> None:
    """Returns when the client has closed the connection; the body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
