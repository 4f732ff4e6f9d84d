"""How much each member of a group counts in the new expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from collegium.compress.planners.scores import LayerScores
from collegium.errors import ConfigError
from collegium.measure.statistics import Statistics

__all__ = ["Shares", "Weighted", "group_shares"]

Shares = Literal["frequency", "importance", "equal"]
"""By the tokens each member saw, by its share of the layer's importance, or all the same."""


def group_shares(scores: LayerScores, group: tuple[int, ...], by: Shares) -> tuple[float, ...]:
    """The share of each member of `group`, in sum 1. Members that are all worth nothing count the same."""
    worth = [float((scores.tokens if by == "frequency" else scores.share)[e]) for e in group]
    total = sum(worth)
    if by == "equal" or not total > 0:
        return (1 / len(group),) * len(group)
    return tuple(one / total for one in worth)


@dataclass(frozen=True)
class Weighted:
    """The part of every grouping that says how much members count.

    Attributes:
        shares: by what.
    """

    shares: Shares = "frequency"

    def __post_init__(self) -> None:
        if self.shares not in get_args(Shares):
            raise ConfigError(f"shares {self.shares!r} is none of {', '.join(get_args(Shares))}")

    def weights(self, scores: LayerScores, group: tuple[int, ...], statistics: Statistics) -> tuple[float, ...]:
        """See `Grouping.weights`; `statistics` are not looked at."""
        return group_shares(scores, group, self.shares)
