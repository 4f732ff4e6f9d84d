"""`Plan`: which experts of each layer are kept, as data. Whoever makes one never applies it, and the other way round.

A plan is one JSON file that can be read, compared, edited by hand and applied again tomorrow. It stores decisions and
the facts they were made from; what follows from those (budget reached, share of importance kept, whether all layers
are left with one number of experts) is computed, so an edited plan cannot contradict itself.

Legend: E experts of a layer, K experts a token chooses, G routing groups of E / G experts, of which a token may use
`top_groups`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from collegium.compress.plan_layer import LayerPlan
from collegium.compress.router_edits import router_edit_needs
from collegium.compress.target import Target
from collegium.errors import ConfigError, PlanError
from collegium.files import atomic_file, read_record

__all__ = [
    "Asked",
    "LayerDiff",
    "LayerPlan",
    "Mtp",
    "Operator",
    "Plan",
    "PlanDiff",
    "Reached",
    "RouterEdit",
    "diff",
]

_LIMIT = 1 << 27  # bytes
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)

Mtp = Literal["refuse", "keep", "drop"]
"""What becomes of multi-token-prediction layers, which have experts of their own and no statistics: "refuse" to apply
the plan to a checkpoint that has them; "keep" them whole, for engines that read their number of experts from the
weights; "drop" them, from weights and config."""


class Asked(BaseModel):
    """The budget: `value` is a share of the experts ("keep"), a size in bytes ("bytes"), a share of the model's
    parameters ("parameters"), or a share of the experts' neurons ("neurons")."""

    model_config = _STRICT

    what: Literal["keep", "bytes", "parameters", "neurons"]
    value: float = Field(gt=0, allow_inf_nan=False)


class RouterEdit(BaseModel):
    """How routers follow. "rows" keeps the rows (and bias entries) of the kept experts as they are; other modes are
    those of `collegium.compress.router_edits`, with their settings; "many_to_one" keeps all rows, and members of a
    group share their new expert, which only our own loader can do."""

    model_config = _STRICT

    mode: str = "rows"
    settings: dict[str, JsonValue] = {}

    @field_validator("mode")
    @classmethod
    def _known(cls, mode: str) -> str:
        try:
            router_edit_needs(mode)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return mode


class Operator(BaseModel):
    """What computes the new experts where they are not old ones: a merge or a factorisation, and its settings."""

    model_config = _STRICT

    name: str
    settings: dict[str, JsonValue] = {}


class Reached(BaseModel):
    """What applying a plan leaves, `of` what there was. Sizes are of the whole model; factors are not counted."""

    model_config = _STRICT

    experts: int
    of_experts: int
    nbytes: int
    of_nbytes: int
    parameters: int
    of_parameters: int


class Plan(BaseModel):
    """Which experts of a model are kept.

    Attributes:
        model, fingerprint, family: the model it is for; see `Target`.
        statistics: checksum of the statistics it was made from, or None.
        method, settings: the importance score, and its settings with those of its domains.
        planner, planner_settings: what chose by that score.
        data, domains: what the statistics were measured on.
        asked: the budget.
        top_k: K, which stays.
        groups, top_groups: of a group-limited router; 1 and 1 without groups.
        nbytes, parameters: of the whole model before.
        layers: every MoE layer, ascending.
        operator: what computes new experts that are no old ones; None where there are none.
        router: how the routers follow.
        mtp: see `Mtp`.
        notes: what a person should know before applying it.
        created: ISO 8601, UTC.
        collegium: version that made it.
    """

    model_config = _STRICT

    schema_version: Literal[1] = 1
    kind: Literal["shrink"] = "shrink"
    model: str
    fingerprint: str | None
    family: str
    statistics: str | None = None
    method: str
    settings: dict[str, JsonValue] = {}
    planner: str
    planner_settings: dict[str, JsonValue] = {}
    data: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    asked: Asked
    top_k: int = Field(ge=1)
    groups: int = Field(ge=1, default=1)
    top_groups: int = Field(ge=1, default=1)
    nbytes: int = Field(ge=0)
    parameters: int = Field(ge=0)
    layers: tuple[LayerPlan, ...] = Field(min_length=1)
    operator: Operator | None = None
    router: RouterEdit = RouterEdit()
    mtp: Mtp = "refuse"
    notes: tuple[str, ...] = ()
    created: str
    collegium: str

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        numbers = [one.layer for one in self.layers]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"layers {numbers} must ascend without repeats")
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups {self.top_groups} is more than the {self.groups} groups")
        for one in self.layers:
            one.check_routable(self.top_k, self.groups, self.top_groups)
        self._check_operator()
        return self

    def _check_operator(self) -> None:
        """Raise ValueError if operator and layers contradict each other."""
        computed = [one.layer for one in self.layers if one.op in ("merge", "factor")]
        if computed and self.operator is None:
            raise ValueError(f"layer {computed[0]} has op 'merge' or 'factor', and the plan names no operator")
        if not computed and self.operator is not None:
            raise ValueError(f"operator {self.operator.name!r}, but no layer has op 'merge' or 'factor'")
        if self.router.mode == "many_to_one" and any(one.gone for one in self.layers):
            raise ValueError("router mode 'many_to_one' needs a new expert for every old one; some are in no group")

    @property
    def portable(self) -> bool:
        """Whether plain transformers can load what this plan makes; else it is for a mask, or for our own loader."""
        widths = {len(ids) for one in self.layers for ids in one.neurons} | {
            one.intermediate_size for one in self.layers if not one.neurons
        }
        factors = any(one.op == "factor" for one in self.layers)
        return self.uniform and len(widths) == 1 and not factors and self.router.mode != "many_to_one"

    @property
    def uniform(self) -> bool:
        """Whether all layers are left with one number of experts, as a checkpoint that loads anywhere must be."""
        return len({len(one.keep) for one in self.layers}) == 1

    @property
    def reached(self) -> Reached:
        """What applying it leaves."""
        experts = [(one.num_experts - len(one.keep), one) for one in self.layers]
        neurons = [(one.neurons_gone, one) for one in self.layers]
        nbytes = sum(n * one.expert_nbytes for n, one in experts) + sum(n * one.neuron_nbytes for n, one in neurons)
        parameters = sum(n * one.expert_parameters for n, one in experts)
        parameters += sum(n * one.neuron_parameters for n, one in neurons)
        return Reached(
            experts=sum(len(one.keep) for one in self.layers),
            of_experts=sum(one.num_experts for one in self.layers),
            nbytes=self.nbytes - nbytes,
            of_nbytes=self.nbytes,
            parameters=self.parameters - parameters,
            of_parameters=self.parameters,
        )

    def check(self, target: Target) -> None:
        """Make sure that it is a plan for `target`.

        Raises:
            PlanError: it was made for another model: other weights, other layers, or other numbers of experts.
        """
        if self.fingerprint is not None and target.fingerprint is not None and self.fingerprint != target.fingerprint:
            raise PlanError(
                f"the plan was made for {self.model} with fingerprint {self.fingerprint}; {target.model} has "
                f"{target.fingerprint}: it is another model, or its weights were changed since. Make a new plan"
            )
        mine = {one.layer: one.num_experts for one in self.layers}
        theirs = {one.layer: one.num_experts for one in target.layers}
        if mine != theirs:
            odd = sorted(layer for layer in mine.keys() | theirs.keys() if mine.get(layer) != theirs.get(layer))
            raise PlanError(
                f"the plan does not fit {target.model}: layer {odd[0]} has {mine.get(odd[0], 'no')} experts in the "
                f"plan and {theirs.get(odd[0], 'none')} in the model ({len(odd)} layers differ)"
            )
        router = (self.top_k, self.groups, self.top_groups)
        if router != (target.top_k, target.groups, target.top_groups):
            raise PlanError(
                f"the plan does not fit {target.model}: it was made for top-{self.top_k} routing over {self.groups} "
                f"groups ({self.top_groups} used), the model has top-{target.top_k} over {target.groups} "
                f"({target.top_groups} used)"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON. Raises StorageError if that cannot be done; what was there before is then untouched."""
        with atomic_file(path) as partial:
            partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote, or someone edited. Nothing in it is trusted.

        Raises:
            PlanError: it is no plan, of another schema, or nonsense; the field is named.
        """
        return read_record(Path(path), cls, what="plan", limit=_LIMIT, error=PlanError)


@dataclass(frozen=True)
class LayerDiff:
    """One layer that two plans treat differently: ids that only one of them keeps, how many both keep, and which other
    decisions differ ("op", "groups", "weights", "neurons")."""

    layer: int
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]
    both: int
    other: tuple[str, ...] = ()

    @property
    def overlap(self) -> float:
        """Jaccard index of the kept sets."""
        return self.both / (self.both + len(self.only_a) + len(self.only_b))


@dataclass(frozen=True)
class PlanDiff:
    """Where two plans for one model differ.

    Attributes:
        fields: field -> (value in a, value in b), of those that say how a plan came about.
        layers: the layers whose decisions differ.
        overlap: Jaccard index of the kept experts, mean over all layers.
    """

    fields: dict[str, tuple[Any, Any]]
    layers: tuple[LayerDiff, ...]
    overlap: float


_PROVENANCE = (
    "statistics", "method", "settings", "planner", "planner_settings", "data", "domains", "asked", "operator", "router",
    "mtp",
)  # fmt: skip


def diff(a: Plan, b: Plan) -> PlanDiff:
    """Where plans `a` and `b` differ.

    Raises:
        PlanError: they are for different models.
    """
    shapes = [[(one.layer, one.num_experts) for one in plan.layers] for plan in (a, b)]
    named = a.fingerprint is not None and b.fingerprint is not None
    if shapes[0] != shapes[1] or (named and a.fingerprint != b.fingerprint):
        raise PlanError(
            f"these are plans for different models: {a.model} ({a.fingerprint}, {len(a.layers)} layers) and {b.model} "
            f"({b.fingerprint}, {len(b.layers)} layers)"
        )
    left, right = a.model_dump(mode="json"), b.model_dump(mode="json")
    layers = []
    for one, other in zip(a.layers, b.layers, strict=True):
        mine, theirs = set(one.keep), set(other.keep)
        only_a, only_b = tuple(sorted(mine - theirs)), tuple(sorted(theirs - mine))
        other_fields = tuple(
            name for name in ("op", "groups", "weights", "neurons") if getattr(one, name) != getattr(other, name)
        )
        layers.append(LayerDiff(one.layer, only_a, only_b, len(mine & theirs), other_fields))
    return PlanDiff(
        fields={name: (left[name], right[name]) for name in _PROVENANCE if left[name] != right[name]},
        layers=tuple(one for one in layers if one.only_a or one.only_b or one.other),
        overlap=sum(one.overlap for one in layers) / len(layers),
    )
