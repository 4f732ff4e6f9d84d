"""MC-SMoE's merge: members aligned to the dominant one, then averaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from collegium.catalog import method
from collegium.compress.matrices import Expert, LayerExperts
from collegium.compress.merge.align import aligned
from collegium.compress.merge.average import by_group, weighted_sum
from collegium.compress.plan_layer import LayerPlan
from collegium.measure.statistics import Statistics

__all__ = ["McSmoe"]


@method("mc_smoe", kind="merge", paper="MC-SMoE (2023)", arxiv="2310.01334")
@dataclass(frozen=True)
class McSmoe:
    """The average of a group's members by their shares, with their neurons matched to those of the dominant member.

    With shares by frequency it is the paper's merge; with the groups of "ream" or "partial_preservation" it is theirs.
    """

    name: ClassVar[str] = "mc_smoe"
    needs_groups: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def merge(self, layer: LayerPlan, experts: LayerExperts, statistics: Statistics | None) -> Iterator[Expert]:
        return by_group(
            layer,
            experts,
            lambda members, shares: weighted_sum(
                (share, expert) for share, (expert, _) in zip(shares, aligned(members, experts), strict=True)
            ),
        )
