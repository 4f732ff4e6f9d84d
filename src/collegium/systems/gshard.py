"""GShard, and its places by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["GShard", "RandomTokenSelection"]


@dataclass(frozen=True)
class _Limited(System):
    """Attributes:
    capacity_factor: places, as a multiple of an even share.
    load_balancing: coefficient.
    """

    capacity_factor: float = 1.25
    load_balancing: float = 0.01

    def _settings(self, capacity: Literal["position", "random"]) -> dict[str, Any]:
        return {
            "router": {
                "weigh": {"normalise": True},
                "capacity": {capacity: {"capacity_factor": self.capacity_factor}},
            },
            "balance": {"load_balancing": self.load_balancing},
        }


@method("gshard", kind="system", paper="GShard (2020)", arxiv="2006.16668")
@dataclass(frozen=True)
class GShard(_Limited):
    """Top-k with a limited number of places: first choices before second ones, earlier tokens of the batch first.

    Attributes:
        capacity_factor: places, as a multiple of an even share.
        load_balancing: coefficient.
    """

    def settings(self, layer: Layer) -> dict[str, Any]:
        return self._settings("position")


@method("random_token_selection", kind="system", arxiv="2109.10465",
        paper="Scalable and Efficient MoE Training for Multitask Multilingual Models (2021)")  # fmt: skip
@dataclass(frozen=True)
class RandomTokenSelection(_Limited):
    """Top-k with a limited number of places that go by chance, so that late tokens are not always those that are
    dropped (Z-code M3).

    Attributes:
        capacity_factor: places, as a multiple of an even share.
        load_balancing: coefficient.
    """

    def settings(self, layer: Layer) -> dict[str, Any]:
        return self._settings("random")
