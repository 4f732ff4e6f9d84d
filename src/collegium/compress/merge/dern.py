"""DERN: the neurons of dropped experts move to kept ones that have a neuron like them.

Legend: E experts of a layer, E' kept ones, S dropped ones, f expert width, d model width, n neurons of a host and those
that moved there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.compress.matrices import Expert, LayerExperts
from collegium.compress.merge.nearest import nearest
from collegium.compress.merge.segments import Projection, flips, segments
from collegium.compress.merge.spherical import seeds, spherical_kmeans
from collegium.compress.plan_layer import LayerPlan
from collegium.errors import ConfigError, PlanError
from collegium.measure.statistics import Statistics

__all__ = ["Dern"]

_EXACT = 1 << 33
"""Multiplications of one round of k-means up to which neurons are compared in full."""
_LEAST = 1e-9
"""Weight of a neuron whose expert has no importance: it counts only where no other does."""


@method("dern", kind="merge", paper="DERN (2025)", arxiv="2509.10377")
@dataclass(frozen=True)
class Dern:
    """Experts in no group are taken apart: each neuron whose nearest neuron among the kept experts is near enough moves
    to the expert that has it, the others go. A host with more than f neurons is reduced to f by weighted spherical
    k-means.

    Protected experts take nothing, and a host that nothing moved to stays as it is. With the sign of up and down free,
    neurons are compared at the better of both signs. K-means always compares the gate too, and starts as `seeds` says,
    which is our reading of what the paper leaves open.

    Attributes:
        threshold: the cosine above which a neuron moves. The paper finds 0.6 best.
        include_gate: compare rows of the gate too when looking for a host; the paper is slightly better without.
        projection: random dimensions in which the nearest are looked for, and k-means runs, where the layer is large.
    """

    threshold: float = 0.6
    include_gate: bool = False
    projection: int = 256

    name: ClassVar[str] = "dern"
    needs: ClassVar[tuple[str, ...]] = ()
    needs_groups: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1 or self.projection < 1:
            raise ConfigError(
                f"threshold is a cosine and projection at least 1; got {self.threshold} and {self.projection}"
            )

    def merge(self, layer: LayerPlan, experts: LayerExperts, statistics: Statistics | None) -> Iterator[Expert]:
        to = self._hosts(layer, experts)
        for new, host in enumerate(layer.keep):
            arrived = [(e, row == new) for e, row in zip(layer.gone, to, strict=True) if bool((row == new).any())]
            yield self._recombined(layer, experts, host, arrived) if arrived else experts.read(host)

    def moved(self, layer: LayerPlan, experts: LayerExperts) -> Tensor:
        """``[E, E']`` float64: the share of each old expert's neurons that moved to each new one; 1 for a kept expert
        and itself. A row of less than 1 in sum lost the rest."""
        share = torch.zeros(layer.num_experts, len(layer.keep), dtype=torch.float64)
        share[list(layer.keep), torch.arange(len(layer.keep))] = 1
        for e, row in zip(layer.gone, self._hosts(layer, experts), strict=True):
            share[e] = torch.bincount(row[row >= 0], minlength=len(layer.keep)) / len(row)
        return share

    def mixing(self, layer: LayerPlan, experts: LayerExperts) -> Tensor:
        """``[E', E]`` float64, in sum 1 along E: how much each old expert counts in a new one's row of the router: its
        importance times the share of its neurons that are there."""
        part = (self.moved(layer, experts) * _importance(layer)[:, None]).T
        return part / part.sum(1, keepdim=True)

    def _hosts(self, layer: LayerPlan, experts: LayerExperts) -> Tensor:
        """``[S, f]`` the new id of the expert that each neuron of each dropped one moves to; -1 where it goes."""
        if any(len(group) > 1 for group in layer.members):
            raise PlanError(
                f"layer {layer.layer}: merge 'dern' decides by itself what goes where, and the plan has groups; make "
                "the plan without a grouping"
            )
        _importance(layer)
        hosts = [e for e in layer.keep if e not in layer.protected]
        if not hosts or not layer.gone:
            return torch.full((len(layer.gone), experts.intermediate_size), -1)
        place, cosine = nearest(experts, layer.gone, hosts, gate=self.include_gate, projection=self.projection)
        new_of = torch.tensor([layer.keep.index(e) for e in hosts])
        return torch.where(cosine > self.threshold, new_of[place], -1)

    def _recombined(
        self, layer: LayerPlan, experts: LayerExperts, host: int, arrived: list[tuple[int, Tensor]]
    ) -> Expert:
        """Expert `host` with f neurons made of its own and those that arrived from each ``(expert, which [f])``."""
        own = experts.read(host)
        crowd = [own, *(experts.read(e).neurons(which.nonzero().flatten()) for e, which in arrived)]
        worth = _importance(layer)[[host, *(e for e, _ in arrived)]].float()
        weights = worth.repeat_interleave(torch.tensor([one.width for one in crowd]))
        together = _together(crowd)
        points = segments(together, flips=flips(experts.weights)).unit()
        width = points.fixed.shape[1] + points.signed.shape[1]
        if width > 2 * self.projection and len(points) * own.width * width > _EXACT:
            points = Projection(points, self.projection)(points).unit()
        size = (together.up if together.gate is None else together.gate).abs().amax(1)
        cluster, sign = spherical_kmeans(points, weights, seeds(points, size, own.width, self.threshold))
        return _centroids(together, weights, cluster, sign, own)


def _importance(layer: LayerPlan) -> Tensor:
    """``[E]`` float64. Raises PlanError if the plan has none."""
    if not layer.scores:
        raise PlanError(
            f"layer {layer.layer}: merge 'dern' weighs neurons by the importance of their experts, and the plan has no "
            "scores"
        )
    return torch.tensor(layer.scores, dtype=torch.float64).clamp(min=_LEAST)


def _together(crowd: list[Expert]) -> Expert:
    """The neurons of several experts as one; the bias of down, which is no neuron's, is left out."""
    found: dict[str, Tensor | None] = {}
    for name in (field.name for field in fields(Expert)):
        parts = [getattr(one, name) for one in crowd]
        missing = name == "down_bias" or parts[0] is None
        found[name] = None if missing else torch.cat(parts, 1 if name == "down" else 0)
    return Expert(**found)  # type: ignore[arg-type]


def _centroids(together: Expert, weights: Tensor, cluster: Tensor, sign: Tensor, own: Expert) -> Expert:
    """One neuron for each cluster: in each matrix the weighted mean of the members' directions, of their mean length. A
    neuron that is alone stays as it is."""
    f = own.width
    total = torch.zeros(f).index_add(0, cluster, weights)
    alone = (torch.bincount(cluster, minlength=f) == 1)[cluster]

    def mean(rows: Tensor, sign: Tensor) -> Tensor:
        lengths = rows.norm(dim=1)
        directions = rows * (weights * sign / lengths.clamp(min=1e-30))[:, None]
        length = torch.zeros(f).index_add(0, cluster, weights * lengths) / total
        found = torch.zeros(f, rows.shape[1]).index_add(0, cluster, directions) * (length / total)[:, None]
        found[cluster[alone]] = rows[alone]
        return found

    def with_bias(matrix: Tensor | None, bias: Tensor | None, sign: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if matrix is None or bias is None:
            return None if matrix is None else mean(matrix, sign), None
        both = mean(torch.cat([matrix, bias[:, None]], 1), sign)
        return both[:, :-1].contiguous(), both[:, -1].contiguous()

    gate, gate_bias = with_bias(together.gate, together.gate_bias, torch.ones_like(sign))
    up, up_bias = with_bias(together.up, together.up_bias, sign)
    down = mean(together.down.T, sign).T.contiguous()
    assert up is not None
    return Expert(gate, up, down, gate_bias, up_bias, own.down_bias)
