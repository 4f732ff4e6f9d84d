"""What expert profiles are of: the model, the tasks, and how they were made."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from collegium._version import __version__
from collegium.compress.target import Target, TargetLayer

__all__ = ["ProfileLayer", "ProfilesMeta"]

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class ProfileLayer(BaseModel):
    """One MoE layer: its E, and the stored bytes and the parameters of one expert with its row of the router."""

    model_config = _STRICT

    layer: int = Field(ge=0)
    num_experts: int = Field(ge=1, lt=1 << 15)
    expert_nbytes: int = Field(ge=0)
    expert_parameters: int = Field(ge=0)


class ProfilesMeta(BaseModel):
    """What the profiles are of.

    Attributes:
        model, fingerprint, family, top_k, groups, top_groups, nbytes, parameters: see `Target`.
        layers: its MoE layers, ascending.
        tasks: names along the first axis.
        tokens: how many each task was measured on.
        importance: the score that ranks are by.
        slots, share: of the keys; see the module.
        data: what the tokens came from.
        created: ISO 8601, UTC.
        collegium: version that made it.
    """

    model_config = _STRICT

    schema_version: Literal[1] = 1
    kind: Literal["profiles"] = "profiles"
    model: str
    fingerprint: str | None
    family: str
    top_k: int = Field(ge=1)
    groups: int = Field(ge=1)
    top_groups: int = Field(ge=1)
    nbytes: int = Field(ge=0)
    parameters: int = Field(ge=0)
    layers: tuple[ProfileLayer, ...] = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=1)
    tokens: tuple[int, ...]
    importance: str
    slots: int = Field(ge=1)
    share: float = Field(ge=0, le=1)
    data: tuple[str, ...]
    created: str
    collegium: str

    @model_validator(mode="after")
    def _consistent(self) -> ProfilesMeta:
        numbers = [one.layer for one in self.layers]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"layers {numbers} must ascend without repeats")
        if len(set(self.tasks)) != len(self.tasks) or len(self.tokens) != len(self.tasks):
            raise ValueError(f"tasks {list(self.tasks)} repeat a name, or there are not as many counts of tokens")
        if self.top_groups > self.groups or any(one.num_experts % self.groups for one in self.layers):
            raise ValueError(f"{self.groups} routing groups, {self.top_groups} used, do not fit the experts")
        return self

    @property
    def target(self) -> Target:
        """The model, as planners know it."""
        layers = (
            TargetLayer(one.layer, one.num_experts, one.expert_nbytes, one.expert_parameters) for one in self.layers
        )
        return Target(
            model=self.model,
            fingerprint=self.fingerprint,
            family=self.family,
            top_k=self.top_k,
            layers=tuple(layers),
            nbytes=self.nbytes,
            parameters=self.parameters,
            groups=self.groups,
            top_groups=self.top_groups,
        )

    @classmethod
    def of(cls, target: Target, **fields: Any) -> ProfilesMeta:
        """For `target`; `fields` are those that say how the profiles were made."""
        layers = tuple(
            ProfileLayer(
                layer=one.layer,
                num_experts=one.num_experts,
                expert_nbytes=one.expert_nbytes,
                expert_parameters=one.expert_parameters,
            )
            for one in target.layers
        )
        same = ("model", "fingerprint", "family", "top_k", "groups", "top_groups", "nbytes", "parameters")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        known = {name: getattr(target, name) for name in same}
        return cls(layers=layers, created=now, collegium=__version__, **known, **fields)
