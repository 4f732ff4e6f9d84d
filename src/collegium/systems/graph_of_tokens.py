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
    """A token's routing probabilities are an average over its own and those of earlier tokens, which steadies the
    routing late in training.

    Formula:
        r = softmax(W x);  p_i = (1 - share) r_i + share sum_{j <= i} A_ij r_j, top-K of p_i
        w_e = p_e / sum of p over the chosen;  loss = c E sum_e f_e P_e
        A = attention of the layer, mean over its heads;  or softmax_j(x_i . x_j / sqrt(d))

    Cost:
        by attention one more attention call a layer, of values E wide; by similarity a matrix ``[S, S]`` for each
        sequence of S tokens. A cache keeps the probabilities, and by similarity the inputs, of past tokens. No
        parameters.

    Use it:
        where the same tokens change experts from checkpoint to checkpoint, or small changes of the text change the
        routing.

    Not:
        by similarity with long sequences; by attention in families that do not attend through transformers' interface,
        which is refused. Averages are flatter, so choices are closer calls.

    Attributes:
        by: "attention" (of the layer's own attention) or "similarity" (of the router's inputs).
        share: of the average in the result, above 0 and at most 1.
        load_balancing: c, coefficient of the loss.
    """

    by: Literal["attention", "similarity"] = "attention"
    share: float = 1.0
    load_balancing: float = 0.01

    def settings(self, layer: Layer) -> dict[str, Any]:
        return {
            "router": {"transforms": [{f"{self.by}_mix": {"share": self.share}}], "weigh": {"normalise": True}},
            "balance": {"load_balancing": self.load_balancing},
        }
