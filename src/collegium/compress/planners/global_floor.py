"""One ranking over all layers: a layer keeps more where its importance is spread over more experts."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from collegium.catalog import method
from collegium.compress.plan import Asked
from collegium.compress.planners.choose import Choice, Protected, by_group, check_count
from collegium.compress.planners.scores import LayerScores
from collegium.compress.target import Target, fewest_kept
from collegium.errors import ConfigError

__all__ = ["GlobalFloor"]


@method("global_floor", kind="planner", paper="MC-SMoE (2023), its global budget of experts", arxiv="2310.01334")
@dataclass(frozen=True)
class GlobalFloor:
    """The experts with the largest shares of their layer's importance, over all layers, with a floor for each layer.

    Layers are left with different numbers of experts, which no stock engine loads: such a plan is applied as a mask.
    Of a group-limited router one expert of each group is taken at a time.

    Attributes:
        keep: share of all experts, above 0 and up to 1.
        floor: the fewest experts a layer keeps; None means as few as its router can do with.
    """

    keep: float = 0.5
    floor: int | None = None

    name: ClassVar[str] = "global_floor"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or (self.floor is not None and self.floor < 1):
            raise ConfigError(
                f"keep is a share of the experts, above 0 and up to 1, and floor at least 1; got {self.keep} and "
                f"{self.floor}"
            )

    @property
    def asked(self) -> Asked:
        return Asked(what="keep", value=self.keep)

    def choose(self, layers: Sequence[LayerScores], target: Target, protected: Protected) -> Choice:
        groups = target.groups
        ranked = [by_group(scores, groups, protected.get(scores.layer, frozenset())) for scores in layers]
        each = self._floors(ranked, layers, target, protected)
        budget = math.floor(self.keep * sum(layer.num_experts for layer in target.layers) + 0.5)
        budget -= groups * sum(each)
        if budget < 0:
            raise ConfigError(
                f"keep {self.keep:g} is less than the floors of all layers take, {groups * sum(each)} experts; keep "
                "more, or lower the floor"
            )

        def worth(i: int) -> float:
            """Mean share of the experts that layer i would keep next, one of each group."""
            return sum(float(layers[i].share[members[each[i]]]) for members in ranked[i]) / groups

        waiting = [(-worth(i), i) for i in range(len(layers)) if each[i] < len(ranked[i][0])]
        heapq.heapify(waiting)
        while waiting and budget >= groups:
            i = heapq.heappop(waiting)[1]
            each[i] += 1
            budget -= groups
            if each[i] < len(ranked[i][0]):
                heapq.heappush(waiting, (-worth(i), i))
        return {
            scores.layer: tuple(sorted(e for members in groups_ for e in members[:count]))
            for scores, groups_, count in zip(layers, ranked, each, strict=True)
        }

    def _floors(
        self, ranked: list[list[list[int]]], layers: Sequence[LayerScores], target: Target, protected: Protected
    ) -> list[int]:
        """The fewest experts each layer keeps of each of its groups."""
        floors = []
        for groups, scores, layer in zip(ranked, layers, target.layers, strict=True):
            least = fewest_kept(layer.num_experts, target.top_k, target.groups, target.top_groups)
            if self.floor is not None:
                check_count(self.floor, layer, target, f"floor {self.floor}")
                least = min(self.floor, layer.num_experts)
            pinned = protected.get(scores.layer, frozenset())
            floors.append(max(-(-least // target.groups), *(len(pinned & set(members)) for members in groups)))
        return floors
