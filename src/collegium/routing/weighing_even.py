"""Weights that are the same for all chosen experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from collegium.catalog import method
from collegium.routing.parts import Scores, Weigh
from collegium.routing.record import RoutingContext

__all__ = ["Even"]


@method("even", kind="weigh", paper="THOR (2021)", arxiv="2110.04260")
@dataclass(frozen=True)
class Even(Weigh):
    """One divided by the number of the token's experts, whatever the router thinks.

    Formula:
        w_e = 1 / number of the token's experts

    Cost:
        none; the task's gradient does not reach the router.

    Use it:
        where experts are drawn by chance, as in THOR.

    Not:
        with a router that should learn.
    """

    learns = False

    def __call__(self, scores: Scores, index: Tensor, context: RoutingContext) -> Tensor:
        # of a selection that is not fixed, the sentinel of unused slots has a logit of -inf
        used = scores.logits.detach().gather(-1, index).isfinite().float()
        return used / used.sum(-1, keepdim=True).clamp(min=1)
