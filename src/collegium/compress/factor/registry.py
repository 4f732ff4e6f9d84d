"""What makes a class a factorisation: it computes experts whose matrices are products of smaller ones.

    @method("svd", kind="factor", paper="...")
    @dataclass(frozen=True)
    class Svd: ...

The result is for our own loader: no stock engine holds factors of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

from collegium.catalog import methods
from collegium.compress.matrices import LayerExperts
from collegium.compress.plan_layer import LayerPlan
from collegium.compress.settings import settled
from collegium.experts.loose import LooseExpert
from collegium.measure.statistics import Statistics

__all__ = ["Factor", "factors", "find_factor"]


class Factor(Protocol):
    """A frozen dataclass whose fields are its settings, plain data.

    Attributes:
        name: in plans and in the catalogue.
        needs: the statistics that `factor` reads.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def size(self, m: int, n: int) -> int:
        """Parameters that are left of a matrix ``[m, n]``."""

    def factor(self, layer: LayerPlan, experts: LayerExperts, statistics: Statistics | None) -> Iterator[LooseExpert]:
        """The new experts in float32, one for each of ``layer.keep``, in that order. The same arguments give the same
        experts.

        Raises:
            ConfigError: `statistics` lack something of `needs`.
            NonFiniteError: a weight is NaN or infinite.
        """


def factors() -> list[type[Factor]]:
    """All of them, by name."""
    return [one.obj for one in methods("factor")]


def find_factor(name: str, settings: Mapping[str, Any]) -> Factor:
    """The one of this name, with these settings.

    Raises:
        ConfigError: there is none, or it has no such setting, or refuses its value.
    """
    return settled("factor", name, settings)
