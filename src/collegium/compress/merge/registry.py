"""What makes a class a merge: it computes the experts of a layer that are no old ones.

    @method("average", kind="merge", paper="...")
    @dataclass(frozen=True)
    class Average: ...

Legend: E experts of a layer, E' new experts, f expert width, d model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

from collegium.catalog import methods
from collegium.compress.matrices import Expert, LayerExperts
from collegium.compress.plan_layer import LayerPlan
from collegium.compress.settings import settled
from collegium.measure.statistics import Statistics

__all__ = ["Merge", "find_merge", "merges"]


class Merge(Protocol):
    """A frozen dataclass whose fields are its settings, plain data.

    Attributes:
        name: in plans and in the catalogue.
        needs_groups: it makes one expert of each group of the plan; else it decides by itself what goes where.
    """

    name: ClassVar[str]
    needs_groups: ClassVar[bool]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that `merge` reads."""

    def merge(self, layer: LayerPlan, experts: LayerExperts, statistics: Statistics | None) -> Iterator[Expert]:
        """The new experts, one for each of ``layer.keep``, in that order, of f neurons each.

        A group of one member, and a protected expert, is what it was, bit for bit. The same arguments give the same
        experts.

        Raises:
            ConfigError: `statistics` lack something of `needs`.
            PlanError: the plan's groups are not for this merge.
            NonFiniteError: neurons are compared, and a weight is NaN or infinite.
        """


def merges() -> list[type[Merge]]:
    """All of them, by name."""
    return [one.obj for one in methods("merge")]


def find_merge(name: str, settings: Mapping[str, Any]) -> Merge:
    """The one of this name, with these settings.

    Raises:
        ConfigError: there is none, or it has no such setting, or refuses its value.
    """
    return settled("merge", name, settings)
