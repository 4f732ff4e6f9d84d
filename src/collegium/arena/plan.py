"""`ArenaPlan`: which methods are compared, on which run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from collegium.catalog import methods
from collegium.errors import ConfigError
from collegium.named import nearest
from collegium.train import Recipe

__all__ = ["ArenaPlan"]

_OURS = ("run.seed", "run.checkpoint_every", "run.keep_checkpoints")
"""Fields of a recipe that the arena sets."""


class ArenaPlan(BaseModel):
    """A comparison, read from YAML.

    Attributes:
        base: a recipe as plain data, which all methods share.
        methods: name -> fields of the recipe that are other for it, ``{"moe.router": "ssr"}``. Names become folders.
        baseline: the method that the others are compared with.
        seeds: each method is trained once with each.
        probe: tokens of held-out text that the routing is measured on, shared evenly by the domains.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: dict[str, Any]
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    baseline: str
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    probe: int = Field(default=50_000, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> ArenaPlan:
        if self.baseline not in self.methods:
            raise ValueError(f"baseline {self.baseline!r} is none of the methods; {nearest(self.baseline, self.names)}")
        if odd := [name for name in self.methods if not name.replace("_", "").replace("-", "").isalnum()]:
            raise ValueError(f"method {odd[0]!r}: names become folders; letters, digits, - and _ only")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} hold one twice")
        for name, fields in self.methods.items():
            if taken := [field for field in fields if field in _OURS]:
                raise ValueError(f"method {name}: {taken[0]} is set by the arena")
        return self

    @classmethod
    def load(cls, file: str | Path, overrides: Iterable[str] = ()) -> ArenaPlan:
        """Read a YAML file; `overrides` such as ``optim.lr=1e-3`` change its base. All recipes are checked.

        Raises:
            ConfigError: the file cannot be read, or a field or a recipe is wrong; the message names it.
        """
        try:
            data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the plan {file}: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{file}: a plan is a mapping with base, methods and baseline; this is {data!r}")
        if unknown := [name for name in data if name not in cls.model_fields]:
            raise ConfigError(f"{file}: there is no {unknown[0]!r}; {nearest(str(unknown[0]), [*cls.model_fields])}")
        if overrides and isinstance(data.get("base"), dict):
            data["base"] = Recipe.parse(data["base"], overrides, where=f"{file}: base").plain()
        try:
            plan = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{file}: {place + ': ' if place else ''}{_words(first['msg'])}") from error
        for name in plan.methods:
            plan.recipe(name, plan.seeds[0])
        return plan

    @property
    def names(self) -> list[str]:
        """Of the methods, in order."""
        return list(self.methods)

    def only(self, names: Sequence[str]) -> ArenaPlan:
        """The plan of these methods, and the baseline.

        Raises:
            ConfigError: there is no such method; the message names the nearest.
        """
        if unknown := [name for name in names if name not in self.methods]:
            raise ConfigError(f"the plan has no method {unknown[0]!r}; {nearest(unknown[0], self.names)}")
        kept = {name: fields for name, fields in self.methods.items() if name in (*names, self.baseline)}
        return self.model_copy(update={"methods": kept})

    def recipe(self, name: str, seed: int) -> Recipe:
        """The run of one method with one seed. It leaves a checkpoint after a third, two thirds and all of its steps:
        what the routing changes late in training is measured between the last two.

        Raises:
            ConfigError: the fields are no recipe; the message names the method.
        """
        where = f"method {name}"
        fields = {**self.methods[name], "run.seed": seed, "run.keep_checkpoints": 0}
        steps = Recipe.parse(self.base, fields, where).steps
        if steps < 3:
            raise ConfigError(f"{where}: its run is {steps} steps long; it takes at least 3")
        return Recipe.parse(self.base, {**fields, "run.checkpoint_every": steps // 3}, where)

    def systems(self, name: str) -> list[str]:
        """Catalogued systems that the method's router names."""
        said = self.methods[name].get("moe.router")
        key = said if isinstance(said, str) else next(iter(said), None) if isinstance(said, dict) else None
        return [one.name for one in methods("system") if one.name == key]


def _words(message: str) -> str:
    return message.removeprefix("Value error, ")
