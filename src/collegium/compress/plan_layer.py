"""`LayerPlan`: what becomes of the experts of one MoE layer.

Legend: E experts of a layer, K experts a token chooses, f expert width.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from collegium.compress.target import fewest_kept

__all__ = ["LayerPlan"]

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)
_Expert = Annotated[int, Field(ge=0, lt=1 << 16)]
_Neuron = Annotated[int, Field(ge=0, lt=1 << 24)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LayerPlan(BaseModel):
    """The decision for one MoE layer.

    Attributes:
        layer: index of the decoder layer.
        op: "prune" where experts go, "merge" where new experts are computed of several, "slim" where only neurons go,
            "factor" where matrices become products, "identity" where nothing happens.
        num_experts: E before.
        intermediate_size: f before; None if it is not known.
        keep: ids of the kept experts, ascending; the new id of an expert is its place in this list. Of merged ones it
            is the dominant member.
        groups: for each new expert its members, the dominant first; () means that each has none but itself. An expert
            in no group is dropped.
        weights: for each new expert the shares of its members, in sum 1.
        neurons: for each new expert the ids of the neurons it keeps, ascending; () means all.
        protected: ids that had to be kept, whatever their score (super experts, a user's pins).
        scores: ``[E]`` each expert's share of the layer's importance; empty if the plan has no scores.
        expert_nbytes, expert_parameters: of one expert with its row of the router.
        neuron_nbytes, neuron_parameters: of one neuron of one expert.
    """

    model_config = _STRICT

    layer: int = Field(ge=0)
    op: Literal["prune", "merge", "slim", "factor", "identity"]
    num_experts: int = Field(ge=1, le=1 << 16)
    intermediate_size: int | None = Field(ge=1, le=1 << 24, default=None)
    keep: tuple[_Expert, ...] = Field(min_length=1)
    groups: tuple[tuple[_Expert, ...], ...] = ()
    weights: tuple[tuple[_Share, ...], ...] = ()
    neurons: tuple[tuple[_Neuron, ...], ...] = ()
    protected: tuple[_Expert, ...] = ()
    scores: tuple[_Number, ...] = ()
    expert_nbytes: int = Field(ge=0)
    expert_parameters: int = Field(ge=0)
    neuron_nbytes: int = Field(ge=0, default=0)
    neuron_parameters: int = Field(ge=0, default=0)

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
        self._check_op(where)
        self._check_groups(where)
        self._check_neurons(where)
        if self.scores and len(self.scores) != E:
            raise ValueError(f"{where}: {len(self.scores)} scores for {E} experts")
        return self

    def _check_op(self, where: str) -> None:
        whole = len(self.keep) == self.num_experts
        fits = {
            "identity": whole and not self.neurons,
            "prune": not whole and not self.groups,
            "slim": whole and bool(self.neurons),
            "merge": not whole,
            "factor": not self.groups and not self.neurons,
        }
        if not fits[self.op]:
            raise ValueError(
                f"{where}: op {self.op!r} with {len(self.keep)} of {self.num_experts} experts kept, "
                f"{len(self.groups)} groups and {len(self.neurons)} lists of neurons"
            )

    def _check_groups(self, where: str) -> None:
        if not self.groups and not self.weights:
            return
        if tuple(one[0] for one in self.groups if one) != self.keep:
            raise ValueError(f"{where}: groups must begin with the experts in keep, one group for each, in that order")
        members = [e for group in self.groups for e in group]
        if len(set(members)) != len(members) or max(members) >= self.num_experts:
            raise ValueError(f"{where}: groups must not share experts, all below {self.num_experts}")
        if any(list(one[1:]) != sorted(one[1:]) for one in self.groups):
            raise ValueError(f"{where}: the members of a group after the first must ascend")
        crowded = [one for one in self.groups if len(one) > 1 and set(one) & set(self.protected)]
        if crowded:
            raise ValueError(f"{where}: protected experts cannot be merged, and group {list(crowded[0])} holds one")
        if [len(one) for one in self.weights] != [len(one) for one in self.groups]:
            raise ValueError(f"{where}: weights must have one share for each member of each group")
        if any(abs(sum(one) - 1) > 1e-6 for one in self.weights):
            raise ValueError(f"{where}: the weights of each group must be in sum 1")

    def _check_neurons(self, where: str) -> None:
        if not self.neurons:
            return
        if self.intermediate_size is None:
            raise ValueError(f"{where}: neurons without an intermediate_size")
        if len(self.neurons) != len(self.keep):
            raise ValueError(f"{where}: {len(self.neurons)} lists of neurons for {len(self.keep)} experts")
        for expert, ids in zip(self.keep, self.neurons, strict=True):
            if list(ids) != sorted(set(ids)) or (ids and ids[-1] >= self.intermediate_size):
                raise ValueError(
                    f"{where}, expert {expert}: neurons must be ascending ids below {self.intermediate_size} without "
                    "repeats"
                )

    def check_routable(self, K: int, groups: int, top_groups: int) -> None:
        """Raise ValueError if the router cannot find K experts among those it is left with."""
        if self.num_experts % groups:
            raise ValueError(f"layer {self.layer}: {self.num_experts} experts do not form {groups} groups")
        size, least = self.num_experts // groups, fewest_kept(self.num_experts, K, groups, top_groups)
        counts = [sum(e // size == group for e in self.keep) for group in range(groups)]
        if len(set(counts)) > 1:
            raise ValueError(
                f"layer {self.layer} keeps {counts} experts of its {groups} routing groups; the router needs as many "
                "of each"
            )
        if len(self.keep) < least:
            limited = f" in {top_groups} of {groups} groups" if groups > 1 else ""
            raise ValueError(
                f"layer {self.layer} keeps {len(self.keep)} experts; the router chooses {K}{limited} and needs at "
                f"least {least}"
            )

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """For each new expert the old ones it is made of, the dominant first."""
        return self.groups or tuple((e,) for e in self.keep)

    @property
    def shares(self) -> tuple[tuple[float, ...], ...]:
        """For each new expert the share of each of its `members`."""
        return self.weights or tuple((1.0,) for _ in self.keep)

    @property
    def gone(self) -> tuple[int, ...]:
        """Ids of the experts that are in no new one, ascending."""
        kept = {e for group in self.members for e in group}
        return tuple(e for e in range(self.num_experts) if e not in kept)

    @property
    def new_of(self) -> dict[int, int]:
        """Old id -> new id, for every expert that is in a new one."""
        return {e: new for new, group in enumerate(self.members) for e in group}

    @property
    def neurons_gone(self) -> int:
        """Neurons that the new experts lack."""
        return sum((self.intermediate_size or 0) - len(ids) for ids in self.neurons)

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
