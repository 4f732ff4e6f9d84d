"""Who speaks: score -> transforms -> select -> weigh -> `Routing`."""

from __future__ import annotations

from collegium.routing.record import Dispatch, Routing, RoutingContext

__all__ = ["Dispatch", "Routing", "RoutingContext"]
