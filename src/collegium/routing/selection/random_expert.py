"""Experts by chance."""

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

    In training one draw serves the whole micro-batch; at inference each token draws its own, keyed by its position
    where the context has one, so that decoding with a cache draws as the full forward does.

    Attributes:
        unit: of a draw in training: "batch", or "token".
    """

    symmetric = False
    draws = True
    learns = False
    unit: Literal["batch", "token"] = "batch"

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        super().check(num_experts, top_k, parts)
        if self.unit not in ("batch", "token"):
            raise ConfigError(f"unit is {self.unit!r}; it must be 'batch' or 'token'")

    def __call__(self, scores: Scores, top_k: int, context: RoutingContext) -> Tensor:
        T, E = scores.selection.shape
        device = scores.selection.device
        if context.training or context.position is None:
            rows = 1 if context.training and self.unit == "batch" else T
            noise = torch.rand(rows, E, generator=context.generator("random_expert", device), device=device)
        else:
            noise = _by_position(context, E)
        # below all numbers drawn: a forbidden expert comes last
        return noise.expand(T, E).masked_fill(scores.selection == -torch.inf, -1.0).topk(top_k, dim=-1).indices


def _by_position(context: RoutingContext, E: int) -> Tensor:
    """``[T, E]`` numbers that look random and depend on position, expert, layer, iteration and seed alone."""
    assert context.position is not None
    expert = torch.arange(E, device=context.position.device)
    place = context.layer * 104_729 + context.iteration * 611_953 + context.seed * 15_485_863
    key = context.position[:, None] * 1_000_003 + expert * 7919 + place
    for multiplier, shift in ((0x45D9F3B, 16), (0x45D9F3B, 16), (0x2C1B3C6D, 13)):
        key = ((key ^ (key >> shift)) * multiplier) & 0x7FFFFFFF
    return key.float() / 0x7FFFFFFF
