"""Who speaks: score -> transforms -> select -> weigh -> `Routing`."""

from __future__ import annotations

from collegium.routing.config import router_from
from collegium.routing.from_gate import router_from_gate
from collegium.routing.parts import check_parts
from collegium.routing.record import Dispatch, Routing, RoutingContext
from collegium.routing.router import Router, build_gates, build_router

__all__ = [
    "Dispatch",
    "Router",
    "Routing",
    "RoutingContext",
    "build_gates",
    "build_router",
    "check_parts",
    "router_from",
    "router_from_gate",
]
