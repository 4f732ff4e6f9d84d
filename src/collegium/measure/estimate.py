"""Numbers with an interval: a bootstrap over blocks of whole documents.

Tokens of one document are alike, so the document is what is resampled. Documents are dealt into at most `MAX_BLOCKS`
blocks first; a metric then keeps its additive statistics once a block, and a resample is a sum with random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.rng import seed_of

__all__ = ["MAX_BLOCKS", "Bounds", "Estimate", "bootstrap"]

Array = np.ndarray[Any, np.dtype[Any]]

Bounds = tuple[float | Sequence[float], float | Sequence[float]]

MAX_BLOCKS = 64
RESAMPLES = 400


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval, both NaN where a single block gives no idea of the spread."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"

    def __float__(self) -> float:
        return self.value


def bootstrap(
    blocks: Array,
    statistic: Callable[[Array], Any],
    *,
    bounds: Bounds = (-np.inf, np.inf),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Estimate]:
    """Basic bootstrap intervals ``[2 v - q(97.5 %), 2 v - q(2.5 %)]`` of numbers made from additive statistics.

    Args:
        blocks: ``[B, ...]`` sums of each block of documents.
        statistic: from a sum over blocks ``[...]`` to one number or a vector of numbers.
        bounds: lowest and highest possible value (of all numbers, or one for each); intervals are cut there.
        resamples: how many resamples.
        seed: of the resampling.

    Returns:
        One `Estimate` for each number.
    """
    value = np.atleast_1d(np.asarray(statistic(blocks.sum(0)), np.float64))
    B = len(blocks)
    if B < 2:
        return [Estimate(float(v), np.nan, np.nan) for v in value]
    rng = np.random.default_rng(seed_of("bootstrap", seed))
    flat = blocks.reshape(B, -1).astype(np.float64)
    found = np.empty((resamples, len(value)))
    for i, times in enumerate(rng.multinomial(B, np.full(B, 1 / B), size=resamples)):
        found[i] = np.atleast_1d(statistic((times @ flat).reshape(blocks.shape[1:])))
    low, high = np.nanquantile(found, [0.025, 0.975], axis=0)
    ends = (np.clip(2 * value - end, *bounds) for end in (high, low))
    return [Estimate(*map(float, number)) for number in zip(value, *ends, strict=True)]
