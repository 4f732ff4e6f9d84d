"""The nearest neuron, among those of several experts, of each neuron of others.

Legend: S source experts, H host experts, f expert width, n neurons of some sources, c candidates of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from collegium.compress.matrices import LayerExperts
from collegium.compress.merge.segments import Projection, Segments, flips, segments

__all__ = ["nearest"]

_EXACT = 1 << 35
"""Multiplications up to which every pair is compared in full; beyond, only the best of a random projection are."""
_CANDIDATES = 8
_HELD = 1 << 26
"""Numbers of the sources' vectors in memory at a time."""
_PRODUCTS = 1 << 25
"""Inner products in memory at a time."""

Read = Callable[[int], Segments]
"""The vectors ``[f]``, of length 1, of an expert's neurons."""


def nearest(
    experts: LayerExperts, sources: Sequence[int], hosts: Sequence[int], *, gate: bool, projection: int
) -> tuple[Tensor, Tensor]:
    """``(host [S, f] int64, cosine [S, f])``: which of `hosts`, by its place there, has the neuron nearest to each
    neuron of `sources`.

    Where there are many pairs, the 8 best by a random projection to `projection` dimensions are compared in full.

    Args:
        gate: rows of the gate are compared too.
    """
    f = experts.intermediate_size

    def read(e: int) -> Segments:
        return segments(experts.read(e), flips=flips(experts.weights), gate=gate).unit()

    width = (3 if gate and experts.weights.gated else 2) * experts.hidden_size
    project, sketched = None, None
    if width > projection and len(sources) * len(hosts) * f * f * width > _EXACT:
        project = Projection(read(hosts[0]), projection)
        sketched = Segments.cat([project(read(host)) for host in hosts])
    held = max(1, _HELD // (f * width))
    found = []
    for first in range(0, len(sources), held):
        block = sources[first : first + held]
        points = Segments.cat([read(e) for e in block])
        if project is None or sketched is None:
            host, cosine = _best_of_all(points, hosts, read)
        else:
            host, cosine = _best_of(points, _candidates(project(points), sketched), f, hosts, read)
        found.append((host.view(len(block), f), cosine.view(len(block), f)))
    return torch.cat([one for one, _ in found]), torch.cat([one for _, one in found])


def _best_of_all(points: Segments, hosts: Sequence[int], read: Read) -> tuple[Tensor, Tensor]:
    """``(host [n], cosine [n])`` by comparing all pairs."""
    cosine = torch.full((len(points),), -torch.inf)
    host = torch.zeros(len(points), dtype=torch.long)
    for place, e in enumerate(hosts):
        found = points.similarity(read(e)).amax(1)
        host = torch.where(found > cosine, place, host)
        cosine = torch.maximum(found, cosine)
    return host, cosine


def _candidates(points: Segments, neurons: Segments) -> Tensor:
    """``[n, c]`` the most similar of `neurons`, those of all hosts one after the other."""
    count, rows = min(_CANDIDATES, len(neurons)), max(1, _PRODUCTS // len(neurons))
    return torch.cat(
        [
            points[first : first + rows].similarity(neurons).topk(count, dim=1).indices
            for first in range(0, len(points), rows)
        ]
    )


def _best_of(points: Segments, candidates: Tensor, f: int, hosts: Sequence[int], read: Read) -> tuple[Tensor, Tensor]:
    """``(host [n], cosine [n])`` by comparing each point with its candidates."""
    cosines = torch.empty(candidates.shape)
    for place, e in enumerate(hosts):
        row, column = (candidates // f == place).nonzero(as_tuple=True)
        if len(row):
            cosines[row, column] = points[row].paired(read(e)[candidates[row, column] % f])[0]
    cosine, best = cosines.max(1)
    return candidates.gather(1, best[:, None]).squeeze(1) // f, cosine
