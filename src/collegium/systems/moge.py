"""Pangu Pro's mixture of grouped experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["MoGE"]


@method("moge", kind="system", paper="Pangu Pro MoE (2025)", arxiv="2505.21411")
@dataclass(frozen=True)
class MoGE(System):
    """The same number of experts from every group, so that devices that hold a group each are loaded alike whatever the
    tokens are.

    Formula:
        p = softmax(W x) over all experts;  the top K / M of p in each of M groups of neighbours
        w_e = p_e
        loss = c E sum_e f_e P_e

    Cost:
        none beside the plain layer's. Weights add up to no more than those of the plain choice.

    Use it:
        where experts are spread over devices and a step waits for the fullest one.

    Not:
        on one device: the groups only forbid the better choice. Experts cannot change groups once the model is trained.

    Attributes:
        groups: M, as many as devices; divides E and K; None takes K groups, one expert from each.
        load_balancing: c, coefficient of the loss between experts.
    """

    groups: int | None = None
    load_balancing: float = 0.01

    def settings(self, layer: Layer) -> dict[str, Any]:
        groups = layer.num_experts_per_tok if self.groups is None else self.groups
        return {
            "router": {"select": {"grouped_top_k": {"groups": groups}}, "weigh": {"normalise": False}},
            "balance": {"load_balancing": self.load_balancing},
        }
