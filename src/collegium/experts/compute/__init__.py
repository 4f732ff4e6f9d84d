"""Back ends that run experts. Each takes ``(x [T, d], routing, weights)`` and gives ``[T, d]``."""

from __future__ import annotations

from torch import Tensor

from collegium.catalog import get
from collegium.experts.compute.reference import reference
from collegium.experts.weights import ExpertWeights
from collegium.routing.record import Routing

__all__ = ["compute", "reference"]


def compute(x: Tensor, routing: Routing, weights: ExpertWeights, backend: str = "auto") -> Tensor:
    """Run the experts."""
    if backend == "auto":
        backend = "reference"
    return get("compute", backend)(x, routing, weights)
