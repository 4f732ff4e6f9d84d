"""Expert choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["ExpertChoiceSystem"]


@method("expert_choice", kind="system", paper="Mixture-of-Experts with Expert Choice Routing (2022)",
        arxiv="2202.09368")  # fmt: skip
@dataclass(frozen=True)
class ExpertChoiceSystem(System):
    """Experts choose their tokens, so that all are loaded alike without a loss. Not for causal decoding: who is chosen
    depends on later tokens.

    Attributes:
        capacity_factor: tokens of an expert, as a multiple of an even share.
    """

    capacity_factor: float = 1.0

    def settings(self, layer: Layer) -> dict[str, Any]:
        select = {"expert_choice": {"capacity_factor": self.capacity_factor}}
        return {"router": {"select": select, "weigh": {"normalise": False}}, "balance": {"load_balancing": 0.0}}
