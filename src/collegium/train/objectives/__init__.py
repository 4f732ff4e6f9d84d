"""What a training step minimises: how many forward passes a micro-batch takes and what is made of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from collegium.named import one_named
from collegium.train.objectives.base import MicroBatch, StepObjective
from collegium.train.objectives.next_token import NextToken

__all__ = ["MicroBatch", "StepObjective", "as_said", "find_objective"]


def find_objective(said: Any) -> StepObjective:
    """The objective that a recipe names, ``name`` or ``{name: {setting: value}}``.

    Raises:
        ConfigError: there is no such objective or setting (the message names the nearest), or a value is not allowed.
    """
    if said in ("next_token", {"next_token": {}}):
        return NextToken()  # the catalogue imports every room to know all names
    found: StepObjective = one_named("objective", said, "objective")
    return found


def as_said(said: Any) -> str | dict[str, Any]:
    """What a recipe says of its objective, with all settings: one way to write each. Raises ConfigError as
    `find_objective`."""
    settings = asdict(find_objective(said))
    name = said if isinstance(said, str) else next(iter(said))
    return {name: settings} if settings else name
