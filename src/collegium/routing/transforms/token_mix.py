"""Routing decisions averaged over other tokens.

Legend: T tokens, B sequences of S tokens, P tokens of the past, E experts, d model width.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.routing.parts import Part, Scores, Transform
from collegium.routing.record import RoutingContext

__all__ = ["AttentionMix", "SimilarityMix"]


@dataclass(frozen=True)
class _Mix(Transform):
    """``p_i = (1 - share) r_i + share * sum_j A_ij r_j`` over this and earlier tokens j of the sequence."""

    touches = "probs"
    remembers = True
    share: float = 1.0

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share is {self.share}; it must be above 0 and at most 1")

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        mixed = self.mixed(scores, context)
        return scores.with_probs(mixed if self.share == 1 else (1 - self.share) * scores.probs + self.share * mixed)

    @abstractmethod
    def mixed(self, scores: Scores, context: RoutingContext) -> Tensor:
        """``[T, E]`` the averages."""


@method("attention_mix", kind="transform", paper="Graph of Tokens (2025)", arxiv="2505.00792")
@dataclass(frozen=True)
class AttentionMix(_Mix):
    """Averages the probabilities of tokens with the weights of the layer's own attention, the mean over its heads.

    The attention's own masks apply, so causal attention gives causal routing, and fused attention stays: the average is
    one more attention call with probabilities in place of values. (The paper's equations are inferred.)

    Formula:
        p_i = (1 - share) r_i + share sum_j A_ij r_j,  r = the probabilities before,
          A = mean over heads of attention

    Cost:
        one more attention call a layer, with values E wide; a cache keeps the probabilities of past tokens, E numbers
        each.

    Use it:
        where the same tokens change experts from checkpoint to checkpoint.

    Not:
        in a layer that routes several times, or a family that does not attend through transformers' interface: both are
        refused.

    Attributes:
        share: of the average in the result; below 1 the token's own decision keeps a part.
    """

    needs_attention = True

    def mixed(self, scores: Scores, context: RoutingContext) -> Tensor:
        assert context.mix is not None
        return context.mix(scores.probs)


@method("similarity_mix", kind="transform", paper="Graph of Tokens (2025)", arxiv="2505.00792")
@dataclass(frozen=True)
class SimilarityMix(_Mix):
    """Averages the probabilities of tokens by how alike the router's inputs are, over this and the earlier tokens of
    the sequence and document, without learnt weights. (The paper's equations are inferred; the division by sqrt(d) is
    ours, so that `tau` does not depend on the width.)

    Formula:
        p_i = (1 - share) r_i + share sum_{j <= i} A_ij r_j,
          A_ij = softmax_j(x_i . x_j / (tau sqrt(d)))

    Cost:
        a matrix ``[S, S]`` and ``S^2 (d + E)`` multiplications for each sequence of S tokens; a cache keeps inputs and
        probabilities of past tokens, ``d + E`` numbers each.

    Use it:
        as `AttentionMix`, where the layer's attention cannot be asked.

    Not:
        with long sequences, where the matrix is what a step takes; nor in a layer that routes several times, which is
        refused.

    Attributes:
        share: of the average in the result; below 1 the token's own decision keeps a part.
        tau: temperature; the smaller, the fewer tokens count.
    """

    tau: float = 1.0

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        super().check(num_experts, top_k, parts)
        if not self.tau > 0:
            raise ConfigError(f"tau must be above 0, not {self.tau}")

    def mixed(self, scores: Scores, context: RoutingContext) -> Tensor:
        if scores.x is None:
            raise ConfigError("similarity_mix looks at the router's input, and this router was given logits only")
        B, S = context.shape or (1, len(scores.x))
        x = scores.x.float().view(B, S, -1)
        keys = _with_past("similarity_keys", x, context)
        values = _with_past("similarity_values", scores.probs.view(B, S, -1), context)
        past = keys.shape[1] - S
        alike = x @ keys.transpose(1, 2) / (self.tau * math.sqrt(x.shape[-1]))
        at = torch.arange(S, device=x.device)
        seen = torch.arange(past + S, device=x.device) <= past + at[:, None]
        seen = seen.expand(B, S, past + S)
        if context.document is not None and not past:
            document = context.document.view(B, S)
            seen = seen & (document[:, :, None] == document[:, None, :])
        if context.valid is not None and not past:
            # a token of padding sees itself, or it would see nothing
            own = torch.eye(S, dtype=torch.bool, device=x.device)
            seen = seen & (context.valid.view(B, 1, S) | own)
        mixed = alike.masked_fill(~seen, -torch.inf).softmax(-1) @ values
        return mixed.reshape(B * S, -1)


def _with_past(name: str, values: Tensor, context: RoutingContext) -> Tensor:
    """``[B, P + S, n]``: the values of the past that a cache goes with, and these ``[B, S, n]``, which are kept."""
    if context.memory is None:
        return values
    before = context.memory.get(name)
    both = values if before is None else torch.cat([before, values], 1)
    context.memory[name] = both.detach()
    return both
