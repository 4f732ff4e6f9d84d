"""SparseMixer-v2, the routing of Phi-3.5-MoE: one expert after another, each weighed against its near rivals only.

Legend: T tokens, E experts, K slots per token.

Slot by slot, the experts not yet chosen whose logit lies within ``2 * jitter_eps`` (relative) of the best of them are
the *candidates* of that slot. At inference the best is chosen; in training one is drawn from the candidates'
softmax. Its weight is its probability among the candidates, so the K weights do not sum to 1. As experts are drawn,
the router gets a gradient estimate for the discrete choice: in training a drawn expert that is not the best one counts
a third in the forward pass three times out of four, while the gradient is that of the full probability
(Heun's third-order rule).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.routing.parts import Part, Scores, Selection, Weigh
from collegium.routing.record import RoutingContext
from collegium.routing.transforms.logit_selection import LogitSelection

__all__ = ["SparseMixer", "SparseMixerWeights"]


def _candidates(score: Tensor, taken: Tensor, jitter_eps: float) -> Tensor:
    """``[T, E]`` scores, -inf at experts that are `taken` ``[T, E]`` or too far below the best of the others."""
    score = score.masked_fill(taken, -torch.inf)
    with torch.no_grad():
        best = score.amax(-1, keepdim=True)
        distance = (best - score) / score.abs().maximum(best)
        # Taken experts, and any other forbidden one, are inf / inf = nan here and -inf already.
        far = distance > 2 * jitter_eps
    return score.masked_fill(far, -torch.inf)


@method("sparse_mixer", kind="selection", paper="GRIN (2024)", arxiv="2409.12136")
@dataclass(frozen=True)
class SparseMixer(Selection):
    """Chooses K experts one after another, in training by chance among those that come near the best (SparseMixer-v2,
    Phi-3.5-MoE). Meant to run after `LogitSelection` and to be weighed by `SparseMixerWeights`.

    Formula:
        slot by slot, among the experts not yet chosen, best = max_e z_e
        candidates: (best - z_e) / max(|z_e|, best) <= 2 jitter_eps
        at inference the best;  in training e ~ softmax of z over the candidates

    Cost:
        K passes over ``[T, E]``, each with a random number for every one of them in training.

    Use it:
        to give the router a gradient for what it chose, not only for how it weighed.

    Not:
        with scores of another kind than logits, or with other weights.

    Attributes:
        jitter_eps: half the relative distance from the best logit at which an expert is still a candidate
            (``router_jitter_noise`` in Phi-MoE).
    """

    jitter_eps: float = 0.01

    def __call__(self, scores: Scores, top_k: int, context: RoutingContext) -> Tensor:
        score = scores.selection
        taken = torch.zeros_like(score, dtype=torch.bool)
        generator = context.generator("sparse_mixer", score.device) if context.training else None
        chosen = []
        for _ in range(top_k):
            candidates = _candidates(score, taken, self.jitter_eps)
            if generator is not None:  # Adding Gumbel noise and taking the best draws from the softmax.
                noise = torch.empty_like(score).exponential_(generator=generator).log()
                candidates = candidates - noise
            best = candidates.argmax(-1, keepdim=True)
            taken = taken.scatter(-1, best, True)
            chosen.append(best)
        return torch.cat(chosen, -1)


@method("sparse_mixer", kind="weigh", paper="GRIN (2024)", arxiv="2409.12136")
@dataclass(frozen=True)
class SparseMixerWeights(Weigh):
    """Each chosen expert's probability among the candidates of its slot, with a gradient estimate for the discrete
    choice (Heun's third-order rule); the K weights do not sum to 1.

    Formula:
        w = softmax of z over the candidates of the slot, at the chosen expert
        in training, where the chosen is not the best, three times out of four w / 3
        the gradient stays that of w

    Cost:
        K passes over ``[T, E]`` and a random number for each assignment in training.

    Use it:
        with `SparseMixer` of the same `jitter_eps`; anything else is refused.

    Not:
        where weights must add up to 1.

    Attributes:
        jitter_eps: as in the `SparseMixer` it belongs to.
    """

    jitter_eps: float = 0.01

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        if SparseMixer(self.jitter_eps) not in parts or LogitSelection() not in parts:
            raise ConfigError(
                f"{self} weighs the candidates that SparseMixer(jitter_eps={self.jitter_eps}) chose from after "
                f"LogitSelection(); the router has {', '.join(map(str, parts))}"
            )

    def __call__(self, scores: Scores, index: Tensor, context: RoutingContext) -> Tensor:
        logits = scores.logits
        taken = torch.zeros_like(logits, dtype=torch.bool)
        generator = context.generator("sparse_mixer_weights", logits.device) if context.training else None
        weights = []
        for chosen in index.split(1, dim=-1):
            p = _candidates(logits, taken, self.jitter_eps).softmax(-1)
            weight = p.gather(-1, chosen)
            if generator is not None:
                best = p.detach().argmax(-1, keepdim=True)
                draw = torch.rand(weight.shape, generator=generator, device=weight.device)
                full = (chosen == best) | (draw > 0.75)
                halfway = weight.detach() * torch.where(full, 1.0, 1 / 3)
                weight = weight + (halfway - weight).detach()
            taken = taken.scatter(-1, chosen, True)
            weights.append(weight)
        return torch.cat(weights, -1)
