"""Schedulers: in which order, and on which processor, the experts of a layer are loaded and computed."""

from __future__ import annotations

from collegium.offload.geometry import Array
from collegium.offload.predictors.base import FEW
from collegium.offload.schedule.popularity import popularity
from collegium.offload.schedule.resident_first import resident_first

__all__ = ["load_order"]


def load_order(resident: Array, mass: Array, counts: Array, tokens: int) -> Array:
    """In which order the engine and the simulator ask for the experts of a step: `resident_first` where a pass has few
    tokens, `popularity` in a prompt.

    Args:
        resident: ``[n]`` bool of each expert.
        mass, counts: ``[n]`` sums of combine weights, and tokens.
        tokens: of the pass.
    """
    return resident_first(resident, mass) if tokens <= FEW else popularity(resident, counts)
