"""Which expert of a model is which of the model it was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from collegium.compress.plan import Plan
from collegium.compress.rewrite_config import EDIT
from collegium.errors import CheckpointError
from collegium.models.checkpoint import Checkpoint

__all__ = ["Maps", "expert_maps", "maps_of", "new_ids"]

Maps = Mapping[int, Sequence[int]]
"""Layer -> for each expert of the whole model its number in the smaller one, -1 where it is gone."""


def maps_of(plan: Plan) -> Maps:
    """The maps of a plan that is a mask: what stays has its old number."""
    return {one.layer: [e if e in one.keep else -1 for e in range(one.num_experts)] for one in plan.layers}


def expert_maps(small: Checkpoint, whole: Checkpoint) -> Maps | None:
    """The maps of a checkpoint that was made of another one, in one step or several; None if none leads from there.

    An expert that was merged has the number of what it was merged into.

    Raises:
        CheckpointError: the record of the edits is damaged.
    """
    path = small.folder / EDIT
    if not path.is_file():
        return None
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        maps: dict[int, list[int]] | None = None
        while record is not None:
            step = _step(record)
            maps = step if maps is None else _after(step, maps)
            if record["source"]["fingerprint"] == whole.fingerprint:
                return maps
            record = record.get("previous")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    return None


def new_ids(maps: Maps | None, layer: int, whole: int, mine: int) -> Sequence[int] | None:
    """The entry of `maps` for a layer; without maps, equal numbers where both have as many experts."""
    if maps is not None:
        return maps.get(layer)
    return range(whole) if whole == mine else None


def _step(record: Any) -> dict[int, list[int]]:
    if record["kind"] == "recover":  # trained on, with the same experts
        return {int(layer): list(range(len(ids))) for layer, ids in record["maps"].items()}
    plan = Plan.model_validate_json(json.dumps(record["plan"]))
    return {one.layer: [one.new_of.get(e, -1) for e in range(one.num_experts)] for one in plan.layers}


def _after(first: Mapping[int, Sequence[int]], then: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """Two steps as one."""
    return {layer: [then[layer][e] if e >= 0 else -1 for e in ids] for layer, ids in first.items()}
