"""Experts by chance.

Legend: T tokens, E experts, K slots, N draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.routing.parts import Part, Scores, Selection
from collegium.routing.record import RoutingContext

__all__ = ["RandomExpert"]


@method("random_expert", kind="selection", paper="THOR (2021)", arxiv="2110.04260")
@dataclass(frozen=True)
class RandomExpert(Selection):
    """`top_k` experts drawn evenly among those that are not forbidden, whatever the router thinks (THOR).

    In training one draw serves the whole micro-batch. At inference a token draws by its position, where the context has
    one, so that decoding with a cache draws as the full forward does.

    Formula:
        experts of a token ~ U{1 ... E}, K without repetition

    Cost:
        E random numbers for a draw; the router's logits are computed and not used. An ensemble runs all experts.

    Use it:
        with the objective `consistency`, or as the baseline that says what a learnt router is worth.

    Not:
        where experts should specialise: the router learns nothing.

    Attributes:
        unit: of a draw in training: "batch", or "token".
        inference: "token", where each token draws its own experts; "sequence", where it shares those of its document or
            row of the batch; or "ensemble", where it has all that are not forbidden.
    """

    symmetric = False
    draws = True
    learns = False
    unit: Literal["batch", "token"] = "batch"
    inference: Literal["token", "sequence", "ensemble"] = "token"

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        """Where it is K experts at inference, too."""
        return self.inference != "ensemble"

    @property
    def uses_position(self) -> bool:  # type: ignore[override]
        """Where each token draws its own."""
        return self.inference == "token"

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        super().check(num_experts, top_k, parts)
        if self.unit not in ("batch", "token"):
            raise ConfigError(f"unit is {self.unit!r}; it must be 'batch' or 'token'")
        if self.inference not in ("token", "sequence", "ensemble"):
            raise ConfigError(f"inference is {self.inference!r}; it must be 'token', 'sequence' or 'ensemble'")

    def __call__(self, scores: Scores, top_k: int, context: RoutingContext) -> Tensor:
        T, E = scores.selection.shape
        forbidden = scores.selection == -torch.inf
        if self.inference == "ensemble" and not context.training:
            return torch.arange(E, device=forbidden.device).expand(T, E).masked_fill(forbidden, E)
        # below all numbers drawn: a forbidden expert comes last
        return self._drawn(T, E, context, forbidden.device).masked_fill(forbidden, -1.0).topk(top_k, dim=-1).indices

    def _drawn(self, T: int, E: int, context: RoutingContext, device: torch.device) -> Tensor:
        """``[T, E]`` numbers by chance, the largest of which win."""
        if not context.training and self.inference == "sequence":
            return _keyed(_sequence(T, context, device), E, context)
        if not context.training and context.position is not None:
            return _keyed(context.position, E, context)
        rows = 1 if context.training and self.unit == "batch" else T
        noise = torch.rand(rows, E, generator=context.generator("random_expert", device), device=device)
        return noise.expand(T, E)


def _sequence(T: int, context: RoutingContext, device: torch.device) -> Tensor:
    """``[T]`` which sequence a token belongs to: what is known of it at its first token and does not change."""
    if context.document is not None:
        return context.document
    B, S = context.shape or (1, T)
    return torch.arange(B, device=device).repeat_interleave(S)


def _keyed(number: Tensor, E: int, context: RoutingContext) -> Tensor:
    """``[N, E]`` numbers that look random and depend on `number` ``[N]``, expert, layer, iteration and seed alone."""
    expert = torch.arange(E, device=number.device)
    place = (context.layer * 104_729 + context.iteration * 611_953 + context.seed * 15_485_863) & 0x7FFFFFFF
    key = number[:, None] * 1_000_003 + expert * 7919 + place
    for multiplier, shift in ((0x45D9F3B, 16), (0x45D9F3B, 16), (0x2C1B3C6D, 13)):
        key = ((key ^ (key >> shift)) * multiplier) & 0x7FFFFFFF
    return key.float() / 0x7FFFFFFF
