"""As many experts in every layer as a size allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from collegium.catalog import method
from collegium.compress.plan import Asked
from collegium.compress.planners.choose import Choice, Protected, best, check_count
from collegium.compress.planners.scores import LayerScores
from collegium.compress.target import Target
from collegium.errors import ConfigError

__all__ = ["Budget"]


@method("budget", kind="planner", paper="own work (2026)")
@dataclass(frozen=True)
class Budget:
    """The largest number of experts a layer, the same in each, with which the model is not above a size.

    Exactly one of the two is given:

    Attributes:
        nbytes: of the weights of the whole model.
        parameters: share of the whole model's parameters, above 0 and up to 1.
    """

    nbytes: int | None = None
    parameters: float | None = None

    name: ClassVar[str] = "budget"

    def __post_init__(self) -> None:
        if (self.nbytes is None) == (self.parameters is None):
            raise ConfigError("a budget is a size in bytes (nbytes) or a share of the parameters; give one of them")
        if (self.nbytes is not None and self.nbytes < 1) or not 0 < (self.parameters or 1) <= 1:
            raise ConfigError(f"a budget must be above 0, a share at most 1; got {self.nbytes or self.parameters}")

    @property
    def asked(self) -> Asked:
        if self.nbytes is not None:
            return Asked(what="bytes", value=self.nbytes)
        return Asked(what="parameters", value=self.parameters or 1)

    def choose(self, layers: Sequence[LayerScores], target: Target, protected: Protected) -> Choice:
        count = self._count(target)
        return {
            scores.layer: best(
                scores, min(count, layer.num_experts), target.groups, protected.get(scores.layer, frozenset())
            )
            for scores, layer in zip(layers, target.layers, strict=True)
        }

    def _count(self, target: Target) -> int:
        largest = max(layer.num_experts for layer in target.layers)
        count = largest
        while count > 0 and not self._fits(target, count):
            count -= target.groups
        for layer in target.layers:
            size = f"{self.nbytes:,} bytes" if self.nbytes is not None else f"{self.parameters:g} of the parameters"
            check_count(min(count, layer.num_experts), layer, target, f"a budget of {size}")
        return count

    def _fits(self, target: Target, count: int) -> bool:
        gone = [(max(layer.num_experts - count, 0), layer) for layer in target.layers]
        if self.nbytes is not None:
            return target.nbytes - sum(number * layer.expert_nbytes for number, layer in gone) <= self.nbytes
        left = target.parameters - sum(number * layer.expert_parameters for number, layer in gone)
        return left <= (self.parameters or 1) * target.parameters
