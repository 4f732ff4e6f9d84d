"""What makes a class a grouping: it says which experts of a layer become one.

    @method("mc_smoe", kind="grouping", paper="...")
    @dataclass(frozen=True)
    class McSmoe: ...

Legend: E experts of a layer, G routing groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from collegium.catalog import methods
from collegium.compress.planners.scores import LayerScores
from collegium.compress.settings import settled
from collegium.measure.statistics import Statistics

__all__ = ["Grouping", "Groups", "find_grouping", "groupings"]

Groups = tuple[tuple[int, ...], ...]
"""The members of each new expert, the dominant first and the others ascending; by the dominants, ascending."""


class Grouping(Protocol):
    """A frozen dataclass whose fields are its settings, plain data; `name` is in the catalogue."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that `group` reads."""

    def group(
        self,
        scores: LayerScores,
        keep: tuple[int, ...],
        statistics: Statistics,
        protected: frozenset[int],
        groups: int,
    ) -> Groups:
        """The members of each new expert.

        There are as many as in `keep`, also of each of the `groups` routing groups, which no group crosses; but the
        dominants may be others. Protected experts are alone. Where all that are kept of a routing group are protected,
        its other experts have none to join: they are in no group, and are dropped.

        Raises:
            ConfigError: `statistics` lack something of `needs`, or a protected expert is not in `keep`.
        """

    def weights(self, scores: LayerScores, group: tuple[int, ...], statistics: Statistics) -> tuple[float, ...]:
        """The share of each member of a group in the new expert, in sum 1."""


def groupings() -> list[type[Grouping]]:
    """All of them, by name."""
    return [one.obj for one in methods("grouping")]


def find_grouping(name: str, settings: Mapping[str, Any]) -> Grouping:
    """The one of this name, with these settings.

    Raises:
        ConfigError: there is none, or it has no such setting, or refuses its value.
    """
    return settled("grouping", name, settings)
