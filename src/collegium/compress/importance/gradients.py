"""Scores from the gradient of the loss, which a calibration with a backward pass gathers.

Legend: E experts of a layer.
"""

from __future__ import annotations

from torch import Tensor

from collegium.compress.importance.registry import importance
from collegium.measure.statistics import Statistics

__all__ = ["gradient_utility"]


@importance("gradient_utility", needs=("g2", "n"), paper="Expert Upcycling (2026)", arxiv="2604.19835")
def gradient_utility(statistics: Statistics, layer: int, domain: str | None = None) -> Tensor:
    """``[E]`` squared norm of the loss's gradient by the expert's weights, summed over batches. It was meant to tell
    which experts are worth copying: those that the loss pulls at hardest."""
    return statistics.get(layer, "g2", domain)
