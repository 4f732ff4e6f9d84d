"""THOR: experts by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["THOR"]


@method("thor", kind="system", paper="THOR (2021)", arxiv="2110.04260")
@dataclass(frozen=True)
class THOR(System):
    """One expert by chance, for a whole micro-batch in training and for each token by its position at inference; K
    times as wide and 1 / K as many as in the plain layer. There is a router, but nothing looks at it and it learns
    nothing; nor is there a balance loss.

    It belongs with the objective `consistency` of a recipe, which teaches the experts to agree.
    """

    def settings(self, layer: Layer) -> dict[str, Any]:
        return {
            **layer.joined("thor"),
            "router": {"select": "random_expert", "weigh": "even"},
            "balance": {"load_balancing": 0.0},
        }
