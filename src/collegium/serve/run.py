"""Running the application until it is told to stop, and stopping without cutting anybody off."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from collegium.errors import ConfigError

__all__ = ["serve"]

CONNECTIONS = 1024
"""Open connections; more are answered 503. With the limit on bodies this bounds the memory of what is being read."""


def serve(
    app: FastAPI,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    drain_seconds: float = 30.0,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve `app` (of `build_app`) until SIGINT or SIGTERM.

    The first signal refuses new requests (503), finishes those that are running or waiting, for `drain_seconds` at the
    most, and returns; a second one cancels them.

    Args:
        host: an address of this machine; the default can be reached from this machine only.
        port: 0 takes a free one.
        ready: called with the address, ``http://host:port``, once requests are taken.

    Raises:
        ConfigError: the address cannot be used.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=75,  # a client that uses a connection again just as it is closed gets an error
        lifespan="off",
        server_header=False,
    )
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from error
    with listener:
        _Server(config, app.state.batcher, drain_seconds, ready).run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn's server; at a signal it stops taking requests first, and listening only when they are done."""

    def __init__(
        self, config: uvicorn.Config, batcher: Any, drain_seconds: float, ready: Callable[[str], None] | None
    ) -> None:
        super().__init__(config)
        self._batcher, self._drain_seconds, self._ready = batcher, drain_seconds, ready
        self._draining: threading.Thread | None = None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        if self._ready is not None and self.started:
            host, port = sockets[0].getsockname()[:2]
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called in the main thread, between any two of its steps: everything that may wait is left to a thread."""
        if self._draining is None:
            self._draining = threading.Thread(target=self._drain, name="collegium-drain", daemon=True)
            self._draining.start()
        else:
            threading.Thread(target=self._batcher.close, kwargs={"drain": False}, daemon=True).start()

    def _drain(self) -> None:
        self._batcher.close(drain=True, timeout=self._drain_seconds)
        self.should_exit = True
