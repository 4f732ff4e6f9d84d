"""Popularity: of a prompt's experts those with the most tokens first, so that computing one hides loading the next."""

from __future__ import annotations

import numpy as np

from collegium.catalog import method
from collegium.offload.geometry import Array

__all__ = ["popularity"]


@method("popularity", kind="scheduler", paper="Fate (2025)", arxiv="2502.12224")
def popularity(resident: Array, counts: Array) -> Array:
    """The order of a layer of a prompt: resident experts, then absent ones; of both, those of the most tokens first.

    Args:
        resident: ``[n]`` bool of each expert of the step.
        counts: ``[n]`` tokens that use each.

    Returns:
        ``[n]`` places in the arguments; of equals the lower place first.
    """
    return np.lexsort((-counts, ~resident.astype(np.bool_)))
