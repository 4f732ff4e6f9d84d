"""Published ways to route and balance, each as settings of the parts there are; ``router: name`` in a recipe."""

from __future__ import annotations

from collegium.systems.base import Layer, System, expand

__all__ = ["Layer", "System", "expand"]
