"""Logits -> probabilities."""

from __future__ import annotations

from collegium.routing.scores.sigmoid import Sigmoid
from collegium.routing.scores.softmax import Softmax

__all__ = ["Sigmoid", "Softmax"]
