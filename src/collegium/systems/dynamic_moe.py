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

    Formula:
        p = softmax(W x)
        the fewest experts, likeliest first, whose p add up to more than the threshold
        w_e = p_e
        loss = c E sum_e f_e P_e + b mean_t(-sum_e p_te log p_te)

    Cost:
        no parameters. The number of experts of a token is the router's: about ``threshold * E`` before it has learnt
        anything, whatever K the recipe says, and fewer as it becomes sure.

    Use it:
        where hard tokens may cost more and the mean number of experts matters, not that of each token.

    Not:
        where computation and memory must be known before a batch is seen; `most` bounds them.

    Attributes:
        threshold: p, above 0 and at most 1.
        most: experts of a token at most; None is no limit.
        entropy: b, coefficient of the loss on the entropy.
        load_balancing: c, coefficient of the loss between experts.
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
