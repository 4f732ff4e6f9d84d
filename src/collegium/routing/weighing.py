"""The combine weight of each chosen expert.

Legend: T tokens, E experts, K slots per token.

Renormalised weights (sum 1) and raw ones (sum below 1 under a softmax) are different models: a checkpoint trained with
one does not work with the other. With K = 1 a renormalised weight is the constant 1, and the task loss gives the
router no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from collegium.catalog import method
from collegium.routing.parts import Scores, Weigh
from collegium.routing.record import RoutingContext

__all__ = ["Raw", "Renormalised", "SoftmaxSelected"]


@method("raw", kind="weigh", paper="Switch Transformers (2021)", arxiv="2101.03961")
@dataclass(frozen=True)
class Raw(Weigh):
    """The probability itself.

    Formula:
        w_e = p_e

    Cost:
        none.

    Use it:
        with one expert a token, where it is all that the task's gradient reaches, and where the paper does.

    Not:
        to go on with a checkpoint that was trained on renormalised weights, or the other way round: they are different
        models. Under a softmax over many experts weights are small at first.
    """

    def __call__(self, scores: Scores, index: Tensor, context: RoutingContext) -> Tensor:
        return scores.probs.gather(-1, index)


@method("renormalised", kind="weigh", paper="GShard (2020)", arxiv="2006.16668")
@dataclass(frozen=True)
class Renormalised(Weigh):
    """The probability divided by the sum over the token's chosen experts (``norm_topk_prob`` in transformers).

    Formula:
        w_e = p_e / max(epsilon + sum of p over the chosen, minimum)

    Cost:
        none.

    Use it:
        with two experts a token or more, so that the scale of the output does not depend on how sure the router is.

    Not:
        with one expert a token: the weight is the constant 1, and the task gives the router no gradient.

    Attributes:
        epsilon: added to the sum.
        minimum: the sum is raised to at least this (``moe_norm_min`` in Ernie 4.5).
    """

    epsilon: float = 0.0
    minimum: float = 0.0

    def __call__(self, scores: Scores, index: Tensor, context: RoutingContext) -> Tensor:
        weight = scores.probs.gather(-1, index)
        total = weight.sum(-1, keepdim=True) + self.epsilon
        return weight / (total.clamp(min=self.minimum) if self.minimum else total)


@method("softmax_selected", kind="weigh", paper="Sparsely-Gated Mixture-of-Experts (2017)", arxiv="1701.06538")
@dataclass(frozen=True)
class SoftmaxSelected(Weigh):
    """A softmax over the chosen experts' logits only (gpt-oss, GraniteMoE).

    Formula:
        w_e = exp(z_e) / sum of exp(z_i) over the chosen

    Cost:
        none.

    Use it:
        to follow families that do; under a softmax score it is the renormalised probability, computed in one step.

    Not:
        with one expert a token: the weight is the constant 1, and the task gives the router no gradient.
    """

    def __call__(self, scores: Scores, index: Tensor, context: RoutingContext) -> Tensor:
        return scores.logits.gather(-1, index).softmax(-1)
