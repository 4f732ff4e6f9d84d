"""Every document has a pool of experts.

Legend: T tokens, E experts, K slots, D documents, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.routing.parts import Part, Scores, Transform
from collegium.routing.record import RoutingContext

__all__ = ["DocumentPool"]


@method("document_pool", kind="transform", paper="EMO (2026)", arxiv="2605.06663")
@dataclass(frozen=True)
class DocumentPool(Transform):
    """In training a token can choose only among the m experts that its document finds likeliest on average; m is drawn
    anew for each document, layer and step from `smallest` to `largest`. Others get logits of -inf.

    The average looks at the whole document, later tokens included. At inference there is no pool, or one of `eval_size`
    experts that the prompt chooses (all tokens of the first forward) and that stays while the sequence goes on; a
    document mask does not split it.

    Formula:
        q_D = mean of p over the tokens of document D;  pool = the m largest of q_D,
          m ~ U{smallest ... largest}
        z_e = -inf outside of the pool, before the softmax

    Cost:
        a sum by document and a ranking of E experts for each of them, in training; a cache keeps a pool for each
        sequence where `eval_size` is set.

    Use it:
        to make experts stand for domains, so that a few of them are enough for one later.

    Not:
        without the ids of documents, which training needs, or with a balance loss over less than the whole batch, which
        works against it.

    Attributes:
        smallest, largest: bounds of m, both included; at least K, and at most E, which None is.
        eval_size: size of the pool at inference; None is no pool.
    """

    touches = "logits"
    remembers = True
    draws = True
    needs_documents = True
    smallest: int
    largest: int | None = None
    eval_size: int | None = None

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Where there is no pool at inference."""
        return self.eval_size is None

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        low, high = self.smallest, self.largest or num_experts
        if not top_k <= low <= high <= num_experts:
            raise ConfigError(
                f"a pool of {low} to {high} experts: it takes from {top_k}, the slots of a token, to all {num_experts}"
            )
        if self.eval_size is not None and not top_k <= self.eval_size <= num_experts:
            raise ConfigError(f"eval_size is {self.eval_size}; it takes from {top_k}, the slots, to {num_experts}")

    def check_context(self, context: RoutingContext) -> None:
        """Documents are needed in training only."""
        if context.training:
            super().check_context(context)

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        if context.training:
            assert context.document is not None
            names, group = torch.unique(context.document, return_inverse=True)
            low, high = self.smallest, self.largest or scores.logits.shape[1]
            generator = context.generator("document_pool")
            size = torch.randint(low, high + 1, (len(names),), generator=generator).to(scores.logits.device)
            pool = _likeliest(scores.probs, group, size, context.valid)
        elif self.eval_size is None:
            return scores
        else:
            group = _sequence(len(scores.logits), context, scores.logits.device)
            pool = self._of_the_prompt(scores.probs, group, context)
        return scores.with_logits(scores.logits.masked_fill(~pool[group], -torch.inf))

    def _of_the_prompt(self, probs: Tensor, group: Tensor, context: RoutingContext) -> Tensor:
        """``[B, E]``: chosen by the first forward of a cache, and kept."""
        memory = context.memory
        if memory is not None and "document_pool" in memory:
            return memory["document_pool"]
        B = 1 if context.shape is None else context.shape[0]
        assert self.eval_size is not None
        pool = _likeliest(probs, group, torch.full((B,), self.eval_size, device=probs.device), context.valid)
        if memory is not None:
            memory["document_pool"] = pool
        return pool


def _sequence(tokens: int, context: RoutingContext, device: torch.device) -> Tensor:
    """``[T]`` the sequence of each token."""
    if context.shape is None:
        return torch.zeros(tokens, dtype=torch.int64, device=device)
    B, S = context.shape
    return torch.arange(B, device=device).repeat_interleave(S)


@torch.no_grad()
def _likeliest(probs: Tensor, group: Tensor, size: Tensor, valid: Tensor | None) -> Tensor:
    """``[D, E]`` bool: of each document the `size` experts with the largest mean probability, padding left out."""
    p = probs.detach().float() if valid is None else probs.detach().float() * valid[:, None]
    total = p.new_zeros(len(size), p.shape[1]).index_add_(0, group, p)
    rank = total.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return rank < size[:, None]
