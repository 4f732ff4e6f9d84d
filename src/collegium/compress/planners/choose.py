"""What planners share: how many experts a layer must keep, and taking the best so many of them.

Legend: E experts of a layer, K experts a token chooses, G routing groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from collegium.compress.plan import Asked
from collegium.compress.planners.scores import LayerScores
from collegium.compress.target import Target, TargetLayer, fewest_kept
from collegium.errors import ConfigError

__all__ = ["Choice", "Planner", "Protected", "best", "by_group", "check_count", "nearest_count"]

Choice = dict[int, tuple[int, ...]]
"""Layer -> ids of the kept experts, ascending."""
Protected = Mapping[int, frozenset[int]]
"""Layer -> ids that must be kept; a layer without any may be left out."""


class Planner(Protocol):
    """Chooses what is kept. A frozen dataclass whose fields are its settings, plain data; `name` is in the plan."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def asked(self) -> Asked:
        """The budget."""

    def choose(self, layers: Sequence[LayerScores], target: Target, protected: Protected) -> Choice:
        """The kept experts of each of `layers`, which are those of `target`, in the same order.

        Raises:
            ConfigError: the budget leaves a router with too few experts, or has no room for what is protected.
        """


def nearest_count(share: float, layer: TargetLayer, target: Target) -> int:
    """The number of experts nearest to a share of E that is as many of each routing group; halves go up."""
    return target.groups * math.floor(share * layer.num_experts / target.groups + 0.5)


def check_count(count: int, layer: TargetLayer, target: Target, setting: str) -> None:
    """Raises ConfigError if the router of `layer` cannot work with `count` experts; `setting` says who wants that."""
    least = fewest_kept(layer.num_experts, target.top_k, target.groups, target.top_groups)
    if count < least:
        limited = f" in {target.top_groups} of {target.groups} groups" if target.groups > 1 else ""
        raise ConfigError(
            f"{setting} leaves layer {layer.layer} with {count} of {layer.num_experts} experts; its router chooses "
            f"{target.top_k}{limited} and needs at least {least} (a share of {least / layer.num_experts:.4g})"
        )


def by_group(scores: LayerScores, groups: int, protected: frozenset[int]) -> list[list[int]]:
    """The experts of each routing group, those that must be kept in front, then best first."""
    size = len(scores.order) // groups
    ranked = sorted(scores.order, key=lambda e: e not in protected)  # stable, so by score in each part
    return [[e for e in ranked if e // size == group] for group in range(groups)]


def best(scores: LayerScores, count: int, groups: int, protected: frozenset[int]) -> tuple[int, ...]:
    """The best `count` experts, as many of each group, with all of `protected`.

    Raises:
        ConfigError: more are protected than there is room for.
    """
    each, kept = count // groups, []
    for members in by_group(scores, groups, protected):
        pinned = sorted(protected & set(members))
        if len(pinned) > each:
            of_group = " of one routing group" if groups > 1 else ""
            raise ConfigError(
                f"layer {scores.layer}: experts {pinned}{of_group} are protected, but the budget keeps {each}; keep "
                "more experts, or pin fewer"
            )
        kept += members[:each]
    return tuple(sorted(kept))
