"""Select on logits instead of probabilities."""

from __future__ import annotations

from dataclasses import dataclass, replace

from collegium.catalog import method
from collegium.routing.parts import Scores, Transform
from collegium.routing.record import RoutingContext

__all__ = ["LogitSelection"]


@method("logit_selection", kind="transform", paper="Sparsely-Gated Mixture-of-Experts (2017)", arxiv="1701.06538")
@dataclass(frozen=True)
class LogitSelection(Transform):
    """The selection looks at the logits, as in gpt-oss and GraniteMoE.

    Under a softmax both orders agree, except where probabilities of unlike logits round to the same number.

    Formula:
        selection_e = z_e

    Cost:
        none.

    Use it:
        to follow a family that chooses on logits to the bit, and before `SparseMixer`, which compares logits.

    Not:
        before `TopP`, which adds up scores and needs them not to be negative; nor after a bias or a limit, which it
        undoes.
    """

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        return replace(scores, selection=scores.logits.detach())
