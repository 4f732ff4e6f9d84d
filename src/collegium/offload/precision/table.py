"""Table: each expert has a precision of its own, fixed ahead of time (EdgeMoE's bit-width adaptation).

The table is a plan, one JSON file that `collegium.offload.precision.fit_table` makes and anybody may edit.

Legend: E experts of a layer, L layers, T tokens of a pass, K slots.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from collegium.catalog import method
from collegium.errors import ConfigError, PlanError
from collegium.files import atomic_file, read_record
from collegium.offload.geometry import Array, Geometry
from collegium.offload.precision.base import Choice, PrecisionPolicy, PrecisionSettings
from collegium.offload.precision.fixed import Fixed

__all__ = ["PrecisionLayer", "PrecisionPlan", "Table"]

_LIMIT = 1 << 26  # bytes
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class PrecisionLayer(BaseModel):
    """One MoE layer: number of the decoder layer, and bits of each expert."""

    model_config = _STRICT

    layer: int = Field(ge=0)
    bits: tuple[Literal[4, 8, 16, 32], ...] = Field(min_length=1)


class PrecisionPlan(BaseModel):
    """Bits of every expert of a model.

    Attributes:
        model, fingerprint: the model it is for; the fingerprint is None if it was not a checkpoint.
        layers: every MoE layer, ascending.
        settings: how it was made: widths, tolerated loss, sensitivity, what it was measured on.
        reference, loss: nats a token with every expert at its most exact, and with this plan; None if not measured.
        created: ISO 8601, UTC.
        collegium: version that made it.
    """

    model_config = _STRICT

    schema_version: Literal[1] = 1
    kind: Literal["precision"] = "precision"
    model: str
    fingerprint: str | None
    layers: tuple[PrecisionLayer, ...] = Field(min_length=1)
    settings: dict[str, JsonValue] = {}
    reference: float | None = Field(default=None, allow_inf_nan=False)
    loss: float | None = Field(default=None, allow_inf_nan=False)
    created: str
    collegium: str

    @model_validator(mode="after")
    def _consistent(self) -> PrecisionPlan:
        numbers = [one.layer for one in self.layers]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"layers {numbers} must ascend without repeats")
        return self

    def check(self, geometry: Geometry, fingerprint: str | None = None) -> None:
        """Make sure that it is for this model; a fingerprint is compared where both are known.

        Raises:
            PlanError: it is for other layers, experts or weights.
        """
        mine = {one.layer: len(one.bits) for one in self.layers}
        theirs = dict(zip(geometry.layers, geometry.experts, strict=True))
        if mine != theirs:
            odd = min(layer for layer in mine.keys() | theirs.keys() if mine.get(layer) != theirs.get(layer))
            raise PlanError(
                f"the precision plan of {self.model} does not fit: layer {odd} has {mine.get(odd, 'no')} experts in "
                f"the plan and {theirs.get(odd, 'none')} in the model"
            )
        if None not in (fingerprint, self.fingerprint) and fingerprint != self.fingerprint:
            raise PlanError(
                f"the precision plan is for {self.model} with fingerprint {self.fingerprint}; the model has "
                f"{fingerprint}: make a new plan"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON. Raises StorageError; what was there before is then untouched."""
        with atomic_file(path) as partial:
            partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrecisionPlan:
        """Read what `save` wrote, or someone edited. Nothing in it is trusted.

        Raises:
            PlanError: it is no precision plan, or contradicts itself; the field is named.
        """
        return read_record(Path(path), cls, what="precision plan", limit=_LIMIT, error=PlanError)


@method("table", kind="precision", paper="EdgeMoE (2023)", arxiv="2308.14352")
@dataclass(frozen=True)
class Table(PrecisionSettings):
    """The copies that a plan names; with the most exact bits in every place it is the high copy for all.

    Attributes:
        plan: file of a `PrecisionPlan`.
        fingerprint: of the model, to compare with that of the plan; None to compare layers and experts only.
    """

    plan: str
    fingerprint: str | None = None

    def build(self, geometry: Geometry, bits: tuple[int, ...]) -> PrecisionPolicy:
        """Raises PlanError for a plan that is unreadable or of another model."""
        found = PrecisionPlan.load(self.plan)
        found.check(geometry, self.fingerprint)
        wanted = {width for one in found.layers for width in one.bits}
        if lacking := sorted(wanted - set(bits)):
            raise ConfigError(
                f"{self.plan} asks for copies of {lacking[0]} bits; there are copies of {', '.join(map(str, bits))} "
                f"bits. Pack the model with those of the plan, {', '.join(map(str, sorted(wanted, reverse=True)))}"
            )
        if len(wanted) == 1:
            return Fixed(*wanted).build(geometry, bits)
        return _Table(geometry, tuple(width for width in bits if width in wanted), found)


class _Table(PrecisionPolicy):
    def __init__(self, geometry: Geometry, bits: tuple[int, ...], plan: PrecisionPlan) -> None:
        super().__init__(geometry, bits)
        # one place more, for unused slots
        self._bits = [np.array([*one.bits, bits[0]], np.uint8) for one in plan.layers]

    def choose(self, choice: Choice) -> Array:
        return self._bits[choice.layer][np.minimum(choice.experts, self.geometry.experts[choice.layer])]

    def ahead(self, layer: int) -> Array:
        return self._bits[layer][:-1]
