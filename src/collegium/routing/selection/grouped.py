"""The same number of experts from every group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.routing.parts import Part, Scores, Selection
from collegium.routing.record import RoutingContext

__all__ = ["GroupedTopK"]


@method("grouped_top_k", kind="selection", paper="Pangu Pro MoE (2025)", arxiv="2505.21411")
@dataclass(frozen=True)
class GroupedTopK(Selection):
    """The best experts of each of several groups of neighbours, as many of each (MoGE).

    With a group on each device, all devices get the same number of assignments whatever the tokens are. The placement
    is part of the model: experts cannot move between groups. Balance within a group is still up to a loss. (The group
    limit of DeepSeek does the opposite: it keeps a token to few groups.)

    Formula:
        experts of a token = the top K / M of its scores in each of M groups of E / M experts

    Cost:
        none beside that of top-K.

    Use it:
        where experts are spread over devices and a step waits for the fullest one.

    Not:
        on one device, where it only forbids the better choice.

    Attributes:
        groups: M; divides E and top_k.
    """

    symmetric = False
    groups: int

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        super().check(num_experts, top_k, parts)
        if self.groups < 1 or num_experts % self.groups:
            raise ConfigError(
                f"groups is {self.groups}, which does not divide {num_experts} experts into equal groups; "
                "take a divisor"
            )
        if top_k % self.groups:
            raise ConfigError(f"top_k is {top_k}, which {self.groups} groups cannot give equal parts of")

    def __call__(self, scores: Scores, top_k: int, context: RoutingContext) -> Tensor:
        grouped = scores.selection.unflatten(-1, (self.groups, -1))
        index = grouped.topk(top_k // self.groups, dim=-1).indices
        first = torch.arange(self.groups, device=index.device)[:, None] * grouped.shape[-1]
        index = (index + first).flatten(-2)
        # the first choice first, as everywhere
        order = scores.selection.gather(-1, index).argsort(dim=-1, descending=True, stable=True)
        return index.gather(-1, order)
