"""The `Routing` record: which token goes to which expert, with what weight, from what score.

Legend: T tokens, E experts, K slots per token, A assignments (A = T*K where every token has K), d model width.

The record is a flat list of assignments, token-major. Where every token has the same number of slots the ``[T, K]``
views cost nothing. Three tensors are kept apart, because methods differ in which of them they touch:

* the *selection score* ``[T, E]`` is what top-k looked at (bias and group limits included),
* the *probability* ``[T, E]`` is what losses and metrics look at,
* the *combine weight* ``[A]`` is what multiplies an expert's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from collegium.errors import ConfigError
from collegium.rng import generator

__all__ = ["Dispatch", "Routing", "RoutingContext"]


@dataclass(frozen=True, eq=False)
class Dispatch:
    """Assignments sorted by expert, computed once and used by every compute back end.

    Attributes:
        order: ``[A]`` int64, positions in the assignment list, grouped by expert, token order kept inside a group.
        token: ``[A]`` int64, the token of each sorted row (``routing.token[order]``).
        offsets: ``[E+1]`` int64; rows ``offsets[e]:offsets[e+1]`` are expert e's.
    """

    order: Tensor
    token: Tensor
    offsets: Tensor

    @cached_property
    def inverse(self) -> Tensor:
        """``[A]`` int64: the sorted row of each assignment."""
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(self.order.numel(), device=self.order.device)
        return inverse

    @property
    def counts(self) -> Tensor:
        """``[E]`` int64: rows per expert."""
        return self.offsets.diff()


@dataclass(frozen=True, eq=False)
class Routing:
    """Which token goes to which expert, with what weight. See the module docstring for the letters.

    Attributes:
        expert: ``[A]`` int64 expert ids in ``0 .. E-1``, token-major; a token never names an expert twice.
        weight: ``[A]`` combine weights, differentiable.
        num_tokens: T.
        num_experts: E.
        slots: K where every token has exactly K assignments, else None.
        ragged_token: ``[A]`` int64 token of each assignment, ascending; needed only where `slots` is None.
        logits: ``[T, E]`` router logits, kept only if a loss, a transform or a tap asked.
        probs: ``[T, E]`` probabilities, differentiable.
        selection: ``[T, E]`` what the selection looked at.
        kept: ``[A]`` bool, False for an assignment that a capacity limit dropped; None means all are kept.
        num_true: how many of the E experts really compute something (ids below it); None means all E.
            Null and zero-cost experts have the ids from `num_true` on.
        valid: ``[T]`` bool, False for padding; None means every token counts.
    """

    expert: Tensor
    weight: Tensor
    num_tokens: int
    num_experts: int
    slots: int | None = None
    ragged_token: Tensor | None = None
    logits: Tensor | None = None
    probs: Tensor | None = None
    selection: Tensor | None = None
    kept: Tensor | None = None
    num_true: int | None = None
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        if self.expert.dim() != 1 or self.expert.shape != self.weight.shape:
            raise ConfigError(
                f"expert {tuple(self.expert.shape)} and weight {tuple(self.weight.shape)} must be [A] and alike"
            )
        if self.slots is not None and self.expert.numel() != self.num_tokens * self.slots:
            raise ConfigError(
                f"{self.expert.numel()} assignments are not {self.num_tokens} tokens x {self.slots} slots"
            )
        if self.slots is None and (self.ragged_token is None or self.ragged_token.shape != self.expert.shape):
            raise ConfigError("a ragged routing needs ragged_token [A], one token id per assignment")
        if self.valid is not None and self.valid.shape != (self.num_tokens,):
            raise ConfigError(f"valid must be [{self.num_tokens}], one flag per token, got {tuple(self.valid.shape)}")

    @classmethod
    def from_topk(
        cls,
        index: Tensor,
        weight: Tensor,
        num_experts: int,
        *,
        full: bool = False,
        logits: Tensor | None = None,
        probs: Tensor | None = None,
        selection: Tensor | None = None,
        valid: Tensor | None = None,
        num_true: int | None = None,
    ) -> Routing:
        """From transformers' ``[T, K]`` index and weights, where the sentinel ``num_experts`` marks an unused slot.

        `full` is the caller's word that there is no sentinel; it saves a look at the data, on a GPU a wait.
        """
        T, K = index.shape
        index, weight = index.long(), weight.reshape(T, K)
        record = partial(
            cls,
            num_tokens=T,
            num_experts=num_experts,
            logits=logits,
            probs=probs,
            selection=selection,
            valid=valid,
            num_true=num_true,
        )
        used = None if full else index < num_experts
        if used is None or bool(used.all()):
            return record(expert=index.reshape(-1), weight=weight.reshape(-1), slots=K)
        token = torch.arange(T, device=index.device)[:, None].expand(T, K)
        return record(expert=index[used], weight=weight[used], ragged_token=token[used])

    def to_topk(self, slots: int | None = None) -> tuple[Tensor, Tensor]:
        """``([T, K] index, [T, K] weight)`` with sentinel ``num_experts`` and weight 0 in unused slots.

        Dropped assignments (``kept`` False) become unused slots. `slots` widens K.

        Raises:
            ConfigError: some token has more than `slots` assignments.
        """
        if self.slots is not None and self.kept is None and slots in (None, self.slots):
            return self.index_TK, self.weight_TK
        live = slice(None) if self.kept is None else self.kept
        token, expert, weight = self.token[live], self.expert[live], self.weight[live]
        per_token = torch.bincount(token, minlength=self.num_tokens)
        widest = int(per_token.max()) if per_token.numel() else 0
        K = slots if slots is not None else max(widest, self.slots or 0)
        if widest > K:
            raise ConfigError(f"a token has {widest} experts, more than the {K} slots asked for")
        first = per_token.cumsum(0) - per_token
        slot = torch.arange(token.numel(), device=token.device) - first[token]
        index = expert.new_full((self.num_tokens, K), self.num_experts)
        index[token, slot] = expert
        return index, weight.new_zeros(self.num_tokens, K).index_put((token, slot), weight)

    @cached_property
    def token(self) -> Tensor:
        """``[A]`` int64: the token of each assignment."""
        if self.ragged_token is not None:
            return self.ragged_token
        assert self.slots is not None
        return torch.arange(self.num_tokens, device=self.expert.device).repeat_interleave(self.slots)

    @property
    def index_TK(self) -> Tensor:
        """``[T, K]`` view of `expert`. Raises ConfigError where tokens differ in their number of experts."""
        return self.expert.view(self.num_tokens, self._uniform())

    @property
    def weight_TK(self) -> Tensor:
        """``[T, K]`` view of `weight`. Raises ConfigError where tokens differ in their number of experts."""
        return self.weight.view(self.num_tokens, self._uniform())

    def _uniform(self) -> int:
        if self.slots is None:
            raise ConfigError("tokens differ in their number of experts, so there is no [T, K] view; use to_topk()")
        return self.slots

    def only_true(self) -> Routing:
        """The assignments to experts that compute something, as a routing among `num_true` experts."""
        if self.num_true is None or self.num_true == self.num_experts:
            return self
        real = self.expert < self.num_true
        return Routing(
            expert=self.expert[real],
            weight=self.weight[real],
            num_tokens=self.num_tokens,
            num_experts=self.num_true,
            ragged_token=self.token[real],
            kept=None if self.kept is None else self.kept[real],
            valid=self.valid,
        )

    def dispatch(self) -> Dispatch:
        """Assignments sorted by expert; dropped ones are left out. Computed once per record."""
        return self._dispatch

    @cached_property
    def _dispatch(self) -> Dispatch:
        expert = self.expert.detach()
        alive = None if self.kept is None else self.kept.nonzero().squeeze(1)
        if alive is not None:
            expert = expert[alive]
        # A 16-bit key sorts several times faster than a 64-bit one.
        key = expert.to(torch.int16) if self.num_experts <= 2**15 else expert
        order = torch.argsort(key, stable=True)
        counts = torch.bincount(expert, minlength=self.num_experts)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        order = order if alive is None else alive[order]
        return Dispatch(order, self.token[order], offsets)

    def counts(self, which: Literal["assigned", "kept", "true"] = "assigned") -> Tensor:
        """``[E]`` int64 assignments per expert, padding tokens left out.

        Args:
            which: "assigned" before capacity drops, "kept" after them, "true" after them and only for experts that
                compute something (``[num_true]``).
        """
        mask = None if self.valid is None else self.valid[self.token]
        if which != "assigned" and self.kept is not None:
            mask = self.kept if mask is None else mask & self.kept
        expert = self.expert if mask is None else self.expert[mask]
        counts = torch.bincount(expert, minlength=self.num_experts)
        return counts[: self.num_true] if which == "true" else counts

    def with_assignments(self, index: Tensor, weight: Tensor) -> Routing:
        """The same record (logits, probabilities, ...) with other ``[T, K]`` choices; for taps that intervene."""
        fresh = Routing.from_topk(index, weight, self.num_experts)
        return replace(
            self,
            expert=fresh.expert,
            weight=fresh.weight,
            slots=fresh.slots,
            ragged_token=fresh.ragged_token,
            kept=None,
        )


@dataclass(frozen=True, eq=False)
class RoutingContext:
    """What some routers need and most do not.

    Attributes:
        layer: index of the decoder layer.
        step, micro_batch, seed: the random key, see `generator`.
        iteration: of a layer that routes several times in a forward, from 0; part of the key.
        draw: which of several forwards over the same micro-batch this is, from 0; part of the key.
        training: whether noise and other training-only parts act.
        previous: the `Routing` of the previous MoE layer.
        mix: callable ``values [T, n] -> [T, n]`` that averages over tokens as this layer's attention does, those of the
            past included that a key-value cache holds; called once a forward.
        shape: ``(sequences, tokens of each)`` with T their product; None where all tokens are one sequence.
        memory: what parts of this layer keep of the sequences between the forwards of a key-value cache, by name, a row
            a sequence; None where there is no cache.
        document, position, modality, task: ``[T]`` int64 ids.
        timestep: ``[T]`` or scalar, for diffusion models.
        valid: ``[T]`` bool, False for padding.
    """

    layer: int = 0
    step: int = 0
    micro_batch: int = 0
    seed: int = 0
    iteration: int = 0
    draw: int = 0
    training: bool = False
    previous: Routing | None = None
    mix: Callable[[Tensor], Tensor] | None = None
    shape: tuple[int, int] | None = None
    memory: dict[str, Tensor] | None = None
    document: Tensor | None = None
    position: Tensor | None = None
    modality: Tensor | None = None
    task: Tensor | None = None
    timestep: Tensor | None = None
    valid: Tensor | None = None

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator keyed by (seed, step, micro-batch, layer, purpose), and by iteration and draw after the first:
        recomputation replays the same choices."""
        more = [*(("iteration", self.iteration) if self.iteration else ()), *(("draw", self.draw) if self.draw else ())]
        return generator(self.seed, self.step, self.micro_batch, self.layer, purpose, *more, device=device)
