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
    """Experts choose their tokens, so that all are loaded alike without a loss.

    Formula:
        p = softmax(W x)
        expert e takes the ceil(capacity_factor T K / E) tokens of the largest p_te
        w_te = p_te

    Cost:
        no parameters and no loss; with a factor of 1 as much computation as K experts a token, spread unevenly over
        tokens.

    Use it:
        where all tokens are there at once: encoders, images, or training for its even load.

    Not:
        for text generated left to right: who is chosen depends on later tokens and on the rest of the batch, so a model
        that goes on from a cache refuses.

    Attributes:
        capacity_factor: tokens of an expert, as a multiple of an even share.
    """

    capacity_factor: float = 1.0

    def settings(self, layer: Layer) -> dict[str, Any]:
        select = {"expert_choice": {"capacity_factor": self.capacity_factor}}
        return {"router": {"select": select, "weigh": {"normalise": False}}, "balance": {"load_balancing": 0.0}}
