"""Switch Transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["Switch"]


@method("switch", kind="system", paper="Switch Transformers (2021)", arxiv="2101.03961")
@dataclass(frozen=True)
class Switch(System):
    """One expert a token, K times as wide and 1 / K as many as in the plain layer, with a limited number of places in
    the order of the batch; who finds none passes by.

    Attributes:
        capacity_factor: places, as a multiple of an even share.
        load_balancing: coefficient.
    """

    capacity_factor: float = 1.25
    load_balancing: float = 0.01

    def settings(self, layer: Layer) -> dict[str, Any]:
        return {
            **layer.joined("switch"),
            "router": {
                "weigh": {"normalise": False},
                "capacity": {"position": {"capacity_factor": self.capacity_factor}},
            },
            "balance": {"load_balancing": self.load_balancing},
        }
