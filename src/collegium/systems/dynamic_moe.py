"""Dynamic routing by top-p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["DynamicMoE"]


@method("dynamic_moe", kind="system", paper="Harder Tasks Need More Experts (2024)", arxiv="2403.07652")
@dataclass(frozen=True)
class DynamicMoE(System):
    """As many experts as it takes to reach a probability, with a loss on the entropy that keeps their number small.

    Attributes:
        threshold, most: see `TopP`.
        entropy, load_balancing: coefficients.
    """

    threshold: float = 0.4
    most: int | None = None
    entropy: float = 1e-4
    load_balancing: float = 0.01

    def settings(self, layer: Layer) -> dict[str, Any]:
        return {
            "router": {
                "select": {"top_p": {"threshold": self.threshold, "most": self.most}},
                "weigh": {"normalise": False},
            },
            "balance": {
                "load_balancing": self.load_balancing,
                "losses": [{"routing_entropy": {"coefficient": self.entropy}}],
            },
        }
