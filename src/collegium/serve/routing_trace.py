"""Which experts a request's tokens went to, and where those came from.

Legend: T token rows of a forward, K slots per token.

A token's trace is the routing of the row that it was chosen from: the last row of the prompt for the first token, the
token before it for every other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np

from collegium.decode import Observer, Stream
from collegium.errors import NotMoEError, UnsupportedFamilyError
from collegium.routing import Routing
from collegium.sites import sites, tap
from collegium.sites.site import Site

__all__ = ["SOURCES", "Engine", "RoutingTrace"]

SOURCES = ("memory", "prefetch", "disk")
"""Where an expert was when it was needed, by the code an engine gives."""

Array = np.ndarray[Any, np.dtype[Any]]
Watcher = Callable[[int, Array, Array, Array], None]


class Engine(Protocol):
    """What a server asks of an engine that keeps experts outside memory."""

    def counters(self) -> dict[str, float]:
        """Sums since the start: hits, misses, bytes, stall seconds and the like."""

    def watch(self, callback: Watcher, /) -> Callable[[], None]:
        """Call ``callback(layer, experts [T, K], weights [T, K], source [T, K] codes of SOURCES)`` once for every MoE
        layer of every forward, in the thread of the forward; the function that ends it."""


class RoutingTrace(Observer):
    """Watches forwards that a traced request takes part in, and only those.

    Args:
        model: whose MoE blocks are tapped where there is no engine; all experts are then in memory.
        engine: tells routing and sources.

    Attributes:
        layers: layer -> experts; empty where `model` does not tell.
        missing: why requests cannot be traced, or None.
    """

    def __init__(self, model: Any, engine: Engine | None = None) -> None:
        self._model, self._engine = model, engine
        self.layers: dict[int, int] = {}
        self.missing: str | None = None
        try:
            self.layers = {site.layer: site.num_experts for site in sites(model)}
        except (NotMoEError, UnsupportedFamilyError) as error:
            self.missing = None if engine is not None else str(error)
        self._watching: ExitStack | None = None
        self._seen: list[tuple[int, Callable[[int], tuple[Array, Array, Array]]]] = []

    def forward(self, rows: tuple[Stream, ...]) -> None:
        """Start or end watching: between forwards, in the thread that runs them."""
        self._seen = []
        wanted = self.missing is None and any(stream.request.trace for stream in rows)
        if wanted and self._watching is None:
            self._watching = ExitStack()
            if self._engine is None:
                self._watching.enter_context(tap(self._model, self._tapped))
            else:
                self._watching.callback(self._engine.watch(self._watched))
        elif not wanted and self._watching is not None:
            self._watching.close()
            self._watching = None

    def token(self, stream: Stream, row: int) -> list[dict[str, Any]]:
        """By MoE layer: experts, weights and sources of one row."""
        found = []
        for layer, take in self._seen:
            experts, weights, source = take(row)
            entry = {"layer": layer, "experts": experts.tolist(), "weights": [round(float(w), 5) for w in weights]}
            found.append({**entry, "source": [SOURCES[code] for code in source]})
        return found

    def _watched(self, layer: int, experts: Array, weights: Array, source: Array) -> None:
        # an engine may use its arrays again
        held = np.array(experts), np.array(weights), np.array(source)
        self._seen.append((layer, lambda row: (held[0][row], held[1][row], held[2][row])))

    def _tapped(self, site: Site, x: Any, routing: Routing) -> None:
        token, experts = routing.token.cpu().numpy(), routing.expert.cpu().numpy()
        weights = routing.weight.detach().float().cpu().numpy()

        def take(row: int) -> tuple[Array, Array, Array]:
            mine = token == row
            return experts[mine], weights[mine], np.zeros(int(mine.sum()), np.uint8)

        self._seen.append((site.layer, take))
