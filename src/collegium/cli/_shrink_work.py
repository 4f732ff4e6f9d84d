"""The work folder of ``collegium shrink``: what is in it, and whether it is this run's."""

from __future__ import annotations

import json
from pathlib import Path

from collegium.compress.plan import Plan
from collegium.compress.rewrite_config import EDIT
from collegium.errors import ConfigError
from collegium.measure.statistics import Statistics
from collegium.measure.super_experts import super_experts

REQUEST, STATISTICS, PLAN = "request.json", "statistics", "plan.json"
PREDICTION, EVALUATION, RECOVERED, PAGE = "prediction.json", "evaluation.json", "recovered.json", "page.html"
SHRUNK, STAGES = "shrunk", "stages"
"""Where models wait that are to be trained further."""
RECOVER_LENGTH = 256
"""Tokens in a sequence of training, at most."""


def check_free(out: Path, work: Path, resume: bool) -> None:
    """Raise ConfigError if `out` holds something that this work folder does not know of."""
    taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    known = resume and (work / PLAN).is_file() and out.is_dir() and made_of(out, Plan.load(work / PLAN))
    if taken and not known:
        raise ConfigError(f"{out} exists; choose a folder that does not, or remove it first")
    if work.exists() and not (work / REQUEST).is_file() and (not work.is_dir() or any(work.iterdir())):
        raise ConfigError(f"{work} exists and holds no work of this command; choose another folder with --work")


def made_of(out: Path, plan: Plan) -> bool:
    """Whether the checkpoint in `out` is what `plan` made."""
    try:
        edit = json.loads((out / EDIT).read_text(encoding="utf-8"))
        edit = edit["previous"] if edit["kind"] == "recover" else edit
        return bool(edit["plan"] == plan.model_dump(mode="json"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_recovered(out: Path) -> bool:
    return bool(json.loads((out / EDIT).read_text(encoding="utf-8"))["kind"] == "recover")


def known_supers(statistics: Statistics) -> dict[int, tuple[int, ...]]:
    """Layer -> its super experts, where the statistics can tell."""
    if not any(entry.name == "down_max" for entry in statistics.meta.statistics):
        return {}
    found: dict[int, tuple[int, ...]] = {}
    for one in super_experts(statistics).found:
        found[one.layer] = tuple(sorted({*found.get(one.layer, ()), one.expert}))
    return found
