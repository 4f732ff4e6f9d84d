"""Collegium: one system for the whole life of a mixture-of-experts model.

``import collegium`` loads nothing heavy; each public name below imports its room on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from collegium._version import __version__

if TYPE_CHECKING:
    from collegium.layer import MoE
    from collegium.models import export, install, load, save
    from collegium.routing import Routing
    from collegium.sites import register, tap
    from collegium.trace import Trace

__all__ = ["MoE", "Routing", "Trace", "__version__", "export", "install", "load", "register", "save", "tap"]

_ROOMS = {
    "MoE": "layer",
    "Routing": "routing",
    "Trace": "trace",
    "export": "models",
    "install": "models",
    "load": "models",
    "register": "sites",
    "save": "models",
    "tap": "sites",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'collegium' has no attribute {name!r}")
    return getattr(importlib.import_module(f"collegium.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
