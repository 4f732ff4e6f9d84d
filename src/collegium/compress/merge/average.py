"""Averages of experts, matrix by matrix.

Legend: f expert width, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from collegium.catalog import method
from collegium.compress.matrices import Expert, LayerExperts
from collegium.compress.plan_layer import LayerPlan
from collegium.measure.statistics import Statistics

__all__ = ["Average", "by_group", "weighted_sum"]


def weighted_sum(parts: Iterable[tuple[float, Expert]]) -> Expert:
    """The sum of ``weight * expert``, one expert in memory at a time. They have the same matrices and shapes."""
    total: dict[str, Tensor | None] = {}
    for weight, expert in parts:
        for name in (field.name for field in fields(expert)):
            value, so_far = getattr(expert, name), total.get(name)
            if value is None:
                total[name] = None
            else:
                total[name] = value * weight if so_far is None else so_far.add_(value, alpha=weight)
    return Expert(**total)  # type: ignore[arg-type]


def by_group(
    layer: LayerPlan, experts: LayerExperts, mix: Callable[[tuple[int, ...], tuple[float, ...]], Expert]
) -> Iterator[Expert]:
    """The new experts of a layer: ``mix(members, shares)`` of each group, and the old expert of a group of one."""
    for members, shares in zip(layer.members, layer.shares, strict=True):
        yield mix(members, shares) if len(members) > 1 else experts.read(members[0])


@method("average", kind="merge", paper="MC-SMoE (2023), its merge without alignment", arxiv="2310.01334")
@dataclass(frozen=True)
class Average:
    """The average of a group's members by their shares, neuron k of one with neuron k of the others."""

    name: ClassVar[str] = "average"
    needs_groups: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def merge(self, layer: LayerPlan, experts: LayerExperts, statistics: Statistics | None) -> Iterator[Expert]:
        return by_group(
            layer,
            experts,
            lambda members, shares: weighted_sum(
                (share, experts.read(e)) for e, share in zip(members, shares, strict=True)
            ),
        )
