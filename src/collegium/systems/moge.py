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
    tokens are; weights are those of a softmax over all experts, not renormalised.

    Attributes:
        groups: as many as devices; None takes K groups, one expert from each.
        load_balancing: coefficient of the loss between experts.
    """

    groups: int | None = None
    load_balancing: float = 0.01

    def settings(self, layer: Layer) -> dict[str, Any]:
        groups = layer.num_experts_per_tok if self.groups is None else self.groups
        return {
            "router": {"select": {"grouped_top_k": {"groups": groups}}, "weigh": {"normalise": False}},
            "balance": {"load_balancing": self.load_balancing},
        }
