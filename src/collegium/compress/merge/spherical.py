"""Weighted spherical k-means of neurons, as DERN reduces those an expert has to those it may have.

Legend: n neurons, k clusters.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from collegium.compress.merge.segments import Segments

__all__ = ["seeds", "spherical_kmeans"]

_ITERATIONS = 20


def seeds(points: Segments, size: Tensor, k: int, alike: float) -> Tensor:
    """``[k]`` int64 the points that clusters start from: those with the largest ``size [n]``.

    A point whose cosine with one already taken is above `alike` is passed over, as long as there are others: two copies
    of one neuron must not take the place of another.
    """
    near = (points.similarity(points) > alike).numpy()
    taken: list[int] = []
    passed: list[int] = []
    covered = np.zeros(len(points), dtype=bool)
    for point in size.argsort(descending=True, stable=True).tolist():
        if covered[point]:
            passed.append(point)
        elif len(taken) < k:
            taken.append(point)
            covered |= near[point]
    return torch.tensor((taken + passed)[:k])


def spherical_kmeans(points: Segments, weights: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """``(cluster [n] int64, sign [n])``: each point goes to the centroid with the largest cosine, at its better sign.

    No cluster is empty.

    Args:
        points: of length 1.
        weights: ``[n]`` not negative, how much a point counts in its centroid.
        start: ``[k]`` the points that clusters start from.
    """
    k = len(start)
    centroids = points[start]
    cluster, sign = torch.full((len(points),), -1), torch.ones(len(points))
    for _ in range(_ITERATIONS):
        found = _nearest(points, centroids, k)
        if found.equal(cluster):
            break
        cluster = found
        sign = points.paired(centroids[cluster])[1]
        scale = weights[:, None]
        centroids = Segments(
            torch.zeros_like(centroids.fixed).index_add(0, cluster, points.fixed * scale),
            torch.zeros_like(centroids.signed).index_add(0, cluster, points.signed * scale * sign[:, None]),
        ).unit()
    return cluster, sign


def _nearest(points: Segments, centroids: Segments, k: int) -> Tensor:
    """``[n]`` the cluster of each point; an empty one takes the point that is farthest from its own centroid."""
    cosine, cluster = points.similarity(centroids).max(1)
    for empty in (torch.bincount(cluster, minlength=k) == 0).nonzero().flatten().tolist():
        crowded = torch.bincount(cluster, minlength=k)[cluster] > 1
        point = int(torch.where(crowded, cosine, torch.inf).argmin())
        cluster[point], cosine[point] = empty, 1
    return cluster
