"""`Plan`: which experts of each layer are kept, as data. Whoever makes one never applies it, and the other way round.

A plan is one JSON file that can be read, compared, edited by hand and applied again tomorrow. It stores decisions and
the facts they were made from; what follows from those (budget reached, share of importance kept, whether all layers
are left with one number of experts) is computed, so an edited plan cannot contradict itself.

Legend: E experts of a layer, K experts a token chooses, G routing groups of E / G experts, of which a token may use
`top_groups`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from collegium.compress.target import Target, fewest_kept
from collegium.errors import PlanError
from collegium.files import atomic_file

__all__ = [
    "Asked",
    "LayerDiff",
    "LayerPlan",
    "Mtp",
    "Plan",
    "PlanDiff",
    "Reached",
    "RouterEdit",
    "diff",
]

_LIMIT = 1 << 27  # bytes
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)
_Expert = Annotated[int, Field(ge=0, lt=1 << 16)]
_Number = Annotated[float, Field(allow_inf_nan=False)]

Mtp = Literal["refuse", "keep", "drop"]
"""What becomes of multi-token-prediction layers, which have experts of their own and no statistics: "refuse" to apply
the plan to a checkpoint that has them; "keep" them whole, for engines that read their number of experts from the
weights; "drop" them, from weights and config."""


class Asked(BaseModel):
    """The budget: `value` is a share of the experts ("keep"), a size in bytes ("bytes"), or a share of the model's
    parameters ("parameters")."""

    model_config = _STRICT

    what: Literal["keep", "bytes", "parameters"]
    value: float = Field(gt=0, allow_inf_nan=False)


class RouterEdit(BaseModel):
    """How routers follow: "rows" keeps the rows (and bias entries) of the kept experts as they are."""

    model_config = _STRICT

    mode: Literal["rows"] = "rows"


class Reached(BaseModel):
    """What applying a plan leaves, `of` what there was. Sizes are of the whole model."""

    model_config = _STRICT

    experts: int
    of_experts: int
    nbytes: int
    of_nbytes: int
    parameters: int
    of_parameters: int


class LayerPlan(BaseModel):
    """The decision for one MoE layer.

    Attributes:
        layer: index of the decoder layer.
        op: "prune", or "identity" where every expert is kept.
        num_experts: E before.
        keep: ids of the kept experts, ascending; the new id of an expert is its place in this list.
        protected: ids that had to be kept, whatever their score (super experts, a user's pins).
        scores: ``[E]`` each expert's share of the layer's importance; empty if the plan has no scores.
        expert_nbytes, expert_parameters: of one expert with its row of the router.
    """

    model_config = _STRICT

    layer: int = Field(ge=0)
    op: Literal["prune", "identity"]
    num_experts: int = Field(ge=1, le=1 << 16)
    keep: tuple[_Expert, ...] = Field(min_length=1)
    protected: tuple[_Expert, ...] = ()
    scores: tuple[_Number, ...] = ()
    expert_nbytes: int = Field(ge=0)
    expert_parameters: int = Field(ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> LayerPlan:
        where, E = f"layer {self.layer}", self.num_experts
        for field in ("keep", "protected"):
            ids = getattr(self, field)
            if list(ids) != sorted(set(ids)) or (ids and ids[-1] >= E):
                raise ValueError(f"{where}: {field} must hold ascending ids below {E} without repeats, not {list(ids)}")
        lost = sorted(set(self.protected) - set(self.keep))
        if lost:
            raise ValueError(f"{where}: protected experts {lost} are not in keep")
        if (self.op == "identity") != (len(self.keep) == E):
            raise ValueError(f"{where}: op {self.op!r} with {len(self.keep)} of {E} experts kept")
        if self.scores and len(self.scores) != E:
            raise ValueError(f"{where}: {len(self.scores)} scores for {E} experts")
        return self

    @property
    def dropped(self) -> tuple[int, ...]:
        """Ids of the experts that go, ascending."""
        kept = set(self.keep)
        return tuple(e for e in range(self.num_experts) if e not in kept)

    @property
    def expected(self) -> float | None:
        """Share of the layer's importance that is kept; None without scores."""
        total = sum(self.scores)
        return sum(self.scores[e] for e in self.keep) / total if total else None


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
            _check_routable(one, self.top_k, self.groups, self.top_groups)
        return self

    @property
    def uniform(self) -> bool:
        """Whether all layers are left with one number of experts, as a checkpoint that loads anywhere must be."""
        return len({len(one.keep) for one in self.layers}) == 1

    @property
    def reached(self) -> Reached:
        """What applying it leaves."""
        gone = [(one.num_experts - len(one.keep), one) for one in self.layers]
        return Reached(
            experts=sum(len(one.keep) for one in self.layers),
            of_experts=sum(one.num_experts for one in self.layers),
            nbytes=self.nbytes - sum(count * one.expert_nbytes for count, one in gone),
            of_nbytes=self.nbytes,
            parameters=self.parameters - sum(count * one.expert_parameters for count, one in gone),
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
        path = Path(path)
        try:
            if path.stat().st_size > _LIMIT:
                raise PlanError(f"{path} is over the limit of {_LIMIT} bytes")
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise PlanError(f"could not read {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "plan"
            raise PlanError(f"{path}: field {field!r}: {first['msg'].removeprefix('Value error, ')}") from error


def _check_routable(layer: LayerPlan, K: int, groups: int, top_groups: int) -> None:
    """Raise ValueError if the router of `layer` cannot find K experts among those it is left with."""
    if layer.num_experts % groups:
        raise ValueError(f"layer {layer.layer}: {layer.num_experts} experts do not form {groups} groups")
    size, least = layer.num_experts // groups, fewest_kept(layer.num_experts, K, groups, top_groups)
    counts = _group_counts(layer.keep, size, groups)
    if len(set(counts)) > 1:
        raise ValueError(
            f"layer {layer.layer} keeps {counts} experts of its {groups} routing groups; the router needs as many of "
            "each"
        )
    if len(layer.keep) < least:
        limited = f" in {top_groups} of {groups} groups" if groups > 1 else ""
        raise ValueError(
            f"layer {layer.layer} keeps {len(layer.keep)} experts; the router chooses {K}{limited} and needs at least "
            f"{least}"
        )


def _group_counts(keep: Iterable[int], size: int, groups: int) -> list[int]:
    """How many of the experts in `keep` each routing group of `size` experts holds."""
    counts = [0] * groups
    for expert in keep:
        counts[expert // size] += 1
    return counts


@dataclass(frozen=True)
class LayerDiff:
    """One layer that two plans treat differently: ids that only one of them keeps, and how many both keep."""

    layer: int
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]
    both: int

    @property
    def overlap(self) -> float:
        """Jaccard index of the kept sets."""
        return self.both / (self.both + len(self.only_a) + len(self.only_b))


@dataclass(frozen=True)
class PlanDiff:
    """Where two plans for one model differ.

    Attributes:
        fields: field -> (value in a, value in b), of those that say how a plan came about.
        layers: the layers whose kept experts differ.
        overlap: Jaccard index of the kept experts, mean over all layers.
    """

    fields: dict[str, tuple[Any, Any]]
    layers: tuple[LayerDiff, ...]
    overlap: float


_PROVENANCE = ("statistics", "method", "settings", "planner", "planner_settings", "data", "domains", "asked", "mtp")


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
        layers.append(LayerDiff(one.layer, only_a, only_b, len(mine & theirs)))
    return PlanDiff(
        fields={name: (left[name], right[name]) for name in _PROVENANCE if left[name] != right[name]},
        layers=tuple(one for one in layers if one.only_a or one.only_b),
        overlap=sum(one.overlap for one in layers) / len(layers),
    )
