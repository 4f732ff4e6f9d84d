"""Sub-MoE's groups: clusters of experts whose outputs point the same way.

Legend: E experts of a layer, n of them in one routing group, k clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from collegium.catalog import method
from collegium.compress.grouping.parts import Part, assembled, output_cosines, parts
from collegium.compress.grouping.registry import Groups
from collegium.compress.grouping.weights import Weighted
from collegium.compress.planners.scores import LayerScores
from collegium.measure.statistics import Statistics

__all__ = ["SubMoe", "kernel_kmeans"]

_ITERATIONS = 100


@method("sub_moe", kind="grouping", paper="Sub-MoE (2025)", arxiv="2506.23266")
@dataclass(frozen=True)
class SubMoe(Weighted):
    """K-means of the experts' outputs, as many clusters as experts are kept, the most used of each its dominant.

    Which experts the planner keeps does not count, except for protected ones, only how many. Outputs are known by the
    mean cosine of each pair, which is all that k-means of unit vectors needs.
    """

    name: ClassVar[str] = "sub_moe"
    needs: ClassVar[tuple[str, ...]] = ("out_cos", "out_cos_n")

    def group(
        self, scores: LayerScores, keep: tuple[int, ...], statistics: Statistics, protected: frozenset[int], groups: int
    ) -> Groups:
        gram = output_cosines(statistics, scores.layer)
        found = parts(scores, keep, protected, groups)
        return assembled(protected, [_clusters(part, gram, scores) for part in found])


def _clusters(part: Part, gram: Tensor, scores: LayerScores) -> dict[int, list[int]]:
    """Dominant -> the other members, for the unprotected experts of one routing group."""
    members = sorted(part.hosts + part.rest)
    if not part.hosts:
        return {}
    labels = kernel_kmeans(gram[members][:, members], len(part.hosts)).tolist()
    rank = {e: place for place, e in enumerate(scores.order)}
    joined = {}
    for cluster in range(len(part.hosts)):
        inside = [e for e, label in zip(members, labels, strict=True) if label == cluster]
        dominant = min(inside, key=lambda e: (-int(scores.tokens[e]), rank[e]))
        joined[dominant] = [e for e in inside if e != dominant]
    return joined


def kernel_kmeans(gram: Tensor, k: int) -> Tensor:
    """``[n]`` int64 cluster of each point, from inner products ``gram [n, n]`` float64. No cluster is empty.

    Seeds are chosen one by one, each the point that lowers the sum of squared distances to the nearest seed most:
    k-means++ with the best candidate in place of a random one, so that the order of the points does not count.

    Args:
        k: number of clusters, from 1 to n.
    """
    n = len(gram)
    own = gram.diagonal()
    distances = (own[:, None] + own - 2 * gram).clamp(min=0)
    seeds: list[int] = []
    nearest = torch.full((n,), torch.inf, dtype=gram.dtype)
    for _ in range(k):
        cost = torch.minimum(nearest[:, None], distances).sum(0)
        cost[seeds] = torch.inf
        seeds.append(int(cost.argmin()))
        nearest = torch.minimum(nearest, distances[seeds[-1]])
    labels = distances[:, seeds].argmin(1)
    labels[seeds] = torch.arange(k)  # identical points do not leave a cluster empty
    for _ in range(_ITERATIONS):
        new = _reassigned(gram, labels, k)
        if new.equal(labels):
            break
        labels = new
    return labels


def _reassigned(gram: Tensor, labels: Tensor, k: int) -> Tensor:
    """``[n]`` the nearest centroid of each point; an empty cluster takes the point that is farthest from its own."""
    inside = F.one_hot(labels, k).to(gram.dtype)
    inside = inside / inside.sum(0)
    to_centroid = gram @ inside
    distances = (inside * to_centroid).sum(0) - 2 * to_centroid + gram.diagonal()[:, None]
    # a point that is as near to its own centroid stays
    distances[torch.arange(len(labels)), labels] -= 1e-12
    labels = distances.argmin(1)
    far = distances.amin(1)
    for empty in (torch.bincount(labels, minlength=k) == 0).nonzero().flatten().tolist():
        crowded = torch.bincount(labels, minlength=k)[labels] > 1
        point = int(torch.where(crowded, far, -torch.inf).argmax())
        labels[point] = empty
        far[point] = 0
    return labels
