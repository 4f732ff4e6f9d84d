"""The K best experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from collegium.catalog import method
from collegium.routing.parts import Scores, Selection
from collegium.routing.record import RoutingContext

__all__ = ["TopK"]


@method("top_k", kind="selection", paper="Sparsely-Gated Mixture-of-Experts (2017)", arxiv="1701.06538")
@dataclass(frozen=True)
class TopK(Selection):
    """The `top_k` experts of highest selection score, best first.

    Formula:
        experts of a token = the K largest s_e

    Cost:
        the baseline: every token has K experts.

    Use it:
        unless a method says otherwise; every engine computes it.

    Not:
        without something that balances: left alone, few experts take most tokens.

    Attributes:
        top_k: K, where a configuration names it here; None takes the layer's.
    """

    top_k: int | None = None

    def __call__(self, scores: Scores, top_k: int, context: RoutingContext) -> Tensor:
        return scores.selection.topk(top_k, dim=-1).indices
