"""Softmax over all experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from collegium.catalog import method
from collegium.routing.parts import Score

__all__ = ["Softmax"]


@method("softmax", kind="score", paper="Switch Transformers (2021)", arxiv="2101.03961")
@dataclass(frozen=True)
class Softmax(Score):
    """A softmax over the E experts: they compete, and a token's probabilities sum to 1.

    Formula:
        p_e = exp(z_e) / sum_i exp(z_i)

    Cost:
        none beside the logits.

    Use it:
        unless a method says otherwise; with one expert a token its raw weight is what the task's gradient reaches.

    Not:
        with a selection bias whose step is fixed: over many experts probabilities are near 1 / E, and such a step is
        large.
    """

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)
