"""THOR: experts by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["THOR"]


@method("thor", kind="system", paper="THOR (2021)", arxiv="2110.04260")
@dataclass(frozen=True)
class THOR(System):
    """One expert by chance, for a whole micro-batch in training and as `inference` says later; K times as wide and
    1 / K as many as in the plain layer.

    Formula:
        y = expert_e(x),  e ~ U{1 ... E / K},  experts of width K f

    Cost:
        that of the plain layer; with the objective `consistency`, which it belongs with, twice that in training. There
        is a router, but nothing looks at it and it learns nothing; nor is there a balance loss. An ensemble runs all
        experts.

    Use it:
        with the objective `consistency` of a recipe, which teaches the experts to agree, where text is scarce; and as
        the baseline that says what a learnt router is worth.

    Not:
        where experts should specialise, or without `consistency`, when nothing makes them agree.

    Attributes:
        inference: an expert for each "token" by its position, one for each "sequence", or the mean of all, "ensemble".
    """

    inference: Literal["token", "sequence", "ensemble"] = "token"

    def settings(self, layer: Layer) -> dict[str, Any]:
        return {
            **layer.joined("thor"),
            "router": {"select": {"random_expert": {"inference": self.inference}}, "weigh": "even"},
            "balance": {"load_balancing": 0.0},
        }
