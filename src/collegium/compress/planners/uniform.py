"""The same number of experts in every layer, so that the result loads anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from collegium.catalog import method
from collegium.compress.plan import Asked
from collegium.compress.planners.choose import Choice, Protected, best, check_count, nearest_count
from collegium.compress.planners.scores import LayerScores
from collegium.compress.target import Target
from collegium.errors import ConfigError

__all__ = ["Uniform"]


@method("uniform", kind="planner", paper="REAP the Experts (2025)", arxiv="2510.13999")
@dataclass(frozen=True)
class Uniform:
    """The best experts of each layer, as many in each; of a group-limited router as many of each group.

    Attributes:
        keep: share of the experts, above 0 and up to 1. The nearest possible number is kept, halves go up.
    """

    keep: float = 0.5

    name: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep is a share of the experts, above 0 and up to 1, not {self.keep}")

    @property
    def asked(self) -> Asked:
        return Asked(what="keep", value=self.keep)

    def choose(self, layers: Sequence[LayerScores], target: Target, protected: Protected) -> Choice:
        choice = {}
        for scores, layer in zip(layers, target.layers, strict=True):
            count = nearest_count(self.keep, layer, target)
            check_count(count, layer, target, f"keep {self.keep:g}")
            choice[scores.layer] = best(scores, count, target.groups, protected.get(scores.layer, frozenset()))
        return choice
