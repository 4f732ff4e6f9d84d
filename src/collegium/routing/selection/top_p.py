"""As many experts as it takes to reach a probability."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.routing.parts import Part, Scores, Selection
from collegium.routing.record import RoutingContext

__all__ = ["TopP"]


@method("top_p", kind="selection", paper="Harder Tasks Need More Experts (2024)", arxiv="2403.07652")
@dataclass(frozen=True)
class TopP(Selection):
    """The fewest experts whose selection scores add up to more than `threshold`, at least one.

    Scores are divided by their sum first, which changes nothing after a softmax. `top_k` is no limit: a flat router
    takes ``ceil(threshold * E)`` experts or so, a sure one takes one.

    Formula:
        s sorted, largest first, and of sum 1:
          expert i is taken while s_1 + ... + s_(i-1) <= threshold

    Cost:
        a sort of E scores for each token; the number of experts, and with it the time of a step, is the router's.

    Use it:
        where hard tokens may cost more, with `RoutingEntropy`, which keeps the number small.

    Not:
        where the cost of a token must be known, unless `most` bounds it; nor on logits, whose sum means nothing.

    Attributes:
        threshold: p, above 0 and at most 1. At 1 every expert may be taken.
        most: experts of a token at most; None is no limit.
    """

    fixed = False
    threshold: float = 0.4
    most: int | None = None

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        super().check(num_experts, top_k, parts)
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"top_p takes experts up to a probability above 0 and at most 1, not {self.threshold}")
        if self.most is not None and not 1 <= self.most <= num_experts:
            raise ConfigError(f"most is {self.most}; of {num_experts} experts it can be 1 to all")

    def __call__(self, scores: Scores, top_k: int, context: RoutingContext) -> Tensor:
        E = scores.selection.shape[-1]
        positive = scores.selection.clamp(min=0).nan_to_num(0.0)
        share = positive / positive.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        ranked, index = share.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        taken = before <= self.threshold  # the one that crosses the threshold is taken, too
        taken[:, 0] = True
        if self.most is not None:
            taken[:, self.most :] = False
        width = int(taken.sum(-1).max()) if len(taken) else 1
        return index.masked_fill(~taken, E)[:, :width]
