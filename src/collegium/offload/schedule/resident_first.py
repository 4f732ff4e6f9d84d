"""Resident first: what is in memory is computed while the rest is on its way."""

from __future__ import annotations

import numpy as np

from collegium.catalog import method
from collegium.offload.geometry import Array

__all__ = ["resident_first"]


@method("resident_first", kind="scheduler", paper="ExpertFlow (2024)", arxiv="2410.17954")
def resident_first(resident: Array, weights: Array) -> Array:
    """The order of a step of decoding: resident experts, then absent ones; of both, those of the largest weight first.

    Args:
        resident: ``[n]`` bool of each expert of the step.
        weights: ``[n]`` combine weights, summed over tokens.

    Returns:
        ``[n]`` places in the arguments; of equals the lower place first.
    """
    return np.lexsort((-weights, ~resident.astype(np.bool_)))
