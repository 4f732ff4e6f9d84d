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
    """``p = softmax(z)`` over the E experts: they compete, and a token's probabilities sum to 1."""

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)
