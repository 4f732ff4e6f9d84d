"""One sigmoid per expert."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from collegium.catalog import method
from collegium.routing.parts import Score

__all__ = ["Sigmoid"]


@method("sigmoid", kind="score", paper="DeepSeek-V3 (2024)", arxiv="2412.19437")
@dataclass(frozen=True)
class Sigmoid(Score):
    """One sigmoid per expert: experts do not compete, and a token's probabilities do not sum to 1.

    Formula:
        p_e = sigmoid(z_e)

    Cost:
        none beside the logits.

    Use it:
        with a selection bias that balances, whose steps fit scores between 0 and 1, and with many experts.

    Not:
        with raw weights: their sum is not bounded by 1. Divide them by their sum.
    """

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()
