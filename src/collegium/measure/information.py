"""Mutual information of counts, and intervals for means over blocks of documents.

The plug-in estimate of mutual information is too high on few samples, by about ``(X - 1)(Y - 1) / (2 N ln 2)`` bits,
which is why every metric here shows a shuffled control beside it. Its interval holds the table
``log2 p(x, y) / (p(x) p(y))`` fixed and resamples its mean over the samples: the first-order (influence-function)
bootstrap, which needs two numbers a block instead of a table.

Legend: X and Y values of the two variables, B blocks of documents, M means.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from collegium.measure.estimate import Bounds, Estimate, bootstrap

__all__ = ["means", "mutual_information", "pointwise_information"]

Array = np.ndarray[Any, np.dtype[Any]]


def pointwise_information(counts: Array) -> Array:
    """``[X, Y]`` counts -> ``log2 p(x, y) / (p(x) p(y))``, 0 where nothing was counted."""
    total = max(counts.sum(), 1)
    expected = counts.sum(1, keepdims=True) * (counts.sum(0, keepdims=True) / total)
    return np.log2(np.divide(counts, expected, out=np.ones(counts.shape), where=counts > 0))


def mutual_information(counts: Array) -> float:
    """Of a table of counts ``[X, Y]``, in bits; 0 for an empty one."""
    return max(float((counts * pointwise_information(counts)).sum() / max(counts.sum(), 1)), 0.0)


def means(sums: Array, bounds: Bounds = (-np.inf, np.inf)) -> list[Estimate]:
    """Means with bootstrap intervals from sums of each block.

    Args:
        sums: ``[B, M + 1]``: sums of M quantities, and of their common weight in the last column. Blocks of weight 0
            are left out.
        bounds: lowest and highest possible mean.

    Returns:
        M estimates, NaN where no block has any weight.
    """
    seen = sums[sums[:, -1] > 0]
    if not len(seen):
        return [Estimate(np.nan, np.nan, np.nan)] * (sums.shape[1] - 1)
    return bootstrap(seen, lambda total: total[:-1] / total[-1], bounds=bounds)
