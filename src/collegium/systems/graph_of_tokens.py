"""Graph of Tokens: routing that looks at other tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["GraphOfTokens"]


@method("graph_of_tokens", kind="system", paper="Graph of Tokens (2025)", arxiv="2505.00792")
@dataclass(frozen=True)
class GraphOfTokens(System):
    """A token's routing probabilities are an average over those of earlier tokens, which steadies the routing late in
    training.

    Attributes:
        by: "attention" (of the layer's own attention) or "similarity" (of the router's inputs).
        share: of the average in the result.
        load_balancing: coefficient.
    """

    by: Literal["attention", "similarity"] = "attention"
    share: float = 1.0
    load_balancing: float = 0.01

    def settings(self, layer: Layer) -> dict[str, Any]:
        return {
            "router": {"transforms": [{f"{self.by}_mix": {"share": self.share}}], "weigh": {"normalise": True}},
            "balance": {"load_balancing": self.load_balancing},
        }
