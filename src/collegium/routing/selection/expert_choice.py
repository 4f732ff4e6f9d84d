"""Experts that choose their tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.routing.parts import Part, Scores, Selection
from collegium.routing.record import RoutingContext

__all__ = ["ExpertChoice"]


@method(
    "expert_choice", kind="selection", paper="Mixture-of-Experts with Expert Choice Routing (2022)", arxiv="2202.09368"
)
@dataclass(frozen=True)
class ExpertChoice(Selection):
    """Each expert takes the tokens that score highest for it.

    Loads are equal by construction; a token may get no expert, or many. Who gets an expert depends on all tokens of the
    batch, later ones included, so that it cannot decode left to right. Padding is never chosen.

    Formula:
        tokens of expert e = the ceil(capacity_factor T K / E) largest s_te over t

    Cost:
        a ranking of T tokens for each expert in place of one of E experts for each token; no loss is needed.

    Use it:
        where all tokens are there at once and experts must be loaded alike.

    Not:
        for text generated left to right, or where an output may not depend on the rest of the batch.

    Attributes:
        capacity_factor: 1 gives a token `top_k` experts on average.
    """

    causal = False
    batch_invariant = False
    fixed = False
    capacity_factor: float = 1.0

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        super().check(num_experts, top_k, parts)
        if not 0 < self.capacity_factor < math.inf:
            raise ConfigError(f"capacity_factor must be above 0 and finite, not {self.capacity_factor}")

    def __call__(self, scores: Scores, top_k: int, context: RoutingContext) -> Tensor:
        T, E = scores.selection.shape
        score = scores.selection
        if context.valid is not None:
            score = score.masked_fill(~context.valid[:, None], -torch.inf)
        live = T if context.valid is None else int(context.valid.sum())
        room = min(live, math.ceil(self.capacity_factor * live * top_k / E))
        chosen = torch.zeros_like(score, dtype=torch.bool)
        if room:
            chosen.scatter_(0, score.topk(room, dim=0).indices, True)
        width = max(1, int(chosen.sum(-1).max())) if T else 1
        # a token's experts, the best first, then the sentinel
        ranked = score.masked_fill(~chosen, -torch.inf).argsort(dim=-1, descending=True, stable=True)[:, :width]
        return ranked.masked_fill(~chosen.gather(-1, ranked), E)
