"""What ``plan``, ``shrink`` and ``profiles`` share: options of a plan as they are written on the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collegium.compress.target import Target
    from collegium.measure.statistics import Statistics

__all__ = ["one_of", "open_planner", "parse_pins", "parse_settings", "target_of"]

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def target_of(statistics: Statistics, model: Path | None) -> Target:
    from collegium.assets import SHIPPED, model_folder
    from collegium.compress.target import Target
    from collegium.errors import ConfigError
    from collegium.models.checkpoint import open_checkpoint

    named = statistics.meta.model
    if model is None and named not in SHIPPED and not (Path(named) / "config.json").is_file():
        raise ConfigError(f"the statistics are of {named!r}, which is no folder here; name the model with --model")
    checkpoint = open_checkpoint(model_folder(model or named))
    _check_tokenizer(statistics, checkpoint.folder)
    return Target.of(checkpoint)


def _check_tokenizer(statistics: Statistics, folder: Path) -> None:
    """Raise ConfigError if the model has another tokenizer than the statistics were made with."""
    from collegium.cli._model import open_tokenizer
    from collegium.data.tokenize import tokenizer_fingerprint
    from collegium.errors import ConfigError

    if statistics.meta.tokenizer is None:
        return
    found = tokenizer_fingerprint(open_tokenizer(folder, trust_remote_code=False))
    if found != statistics.meta.tokenizer:
        raise ConfigError(
            f"the statistics were made with another tokenizer ({statistics.meta.tokenizer}) than {folder} has "
            f"({found}), so they are of other tokens than the model will see; calibrate again"
        )


def open_planner(
    planner: str, keep: float | None, size: str | None, parameters: float | None, floor: int | None
) -> Any:
    from collegium.compress.planners import Budget, GlobalFloor, Uniform
    from collegium.errors import ConfigError

    if sum(value is not None for value in (keep, size, parameters)) > 1:
        raise ConfigError("--keep, --bytes and --parameters exclude each other")
    one_of("--planner", planner, "uniform", "global_floor")
    share = 0.5 if keep is None else keep
    if planner == "global_floor":
        if size is not None or parameters is not None:
            raise ConfigError("the planner global_floor takes a share of the experts, --keep")
        return GlobalFloor(share, floor)
    if floor is not None:
        raise ConfigError("--floor is a setting of the planner global_floor")
    if size is not None or parameters is not None:
        return Budget(None if size is None else _size(size), parameters)
    return Uniform(share)


def parse_settings(texts: list[str]) -> dict[str, dict[str, Any]]:
    """``merge.rank=0.75`` -> ``{"merge": {"rank": 0.75}}``, with an entry for each part of a plan."""
    import yaml

    from collegium.errors import ConfigError

    found: dict[str, dict[str, Any]] = {part: {} for part in ("score", "merge", "grouping", "router", "factor")}
    for text in texts:
        key, equal, value = text.partition("=")
        part, dot, name = key.partition(".")
        if not equal or not dot or part not in found or not name:
            raise ConfigError(f"--set {text!r} must be PART.NAME=VALUE, with PART one of {', '.join(found)}")
        found[part][name] = yaml.safe_load(value)
    return found


def one_of(option: str, value: str, *allowed: str) -> Any:
    from collegium.errors import ConfigError

    if value not in allowed:
        raise ConfigError(f"{option} {value!r} is none of {', '.join(allowed)}")
    return value


def _size(text: str) -> int:
    from collegium.errors import ConfigError

    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})", text.strip().lower())
    if match is None:
        raise ConfigError(f"{text!r} is no size; write for example 14GB, 12.5GiB, or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_pins(texts: list[str]) -> dict[int, set[int]]:
    from collegium.errors import ConfigError

    pins: dict[int, set[int]] = {}
    for text in texts:
        if not re.fullmatch(r"\d+:\d+(,\d+)*", text):
            raise ConfigError(f"--pin {text!r} must be LAYER:EXPERT[,EXPERT...], for example 3:17,20")
        layer, _, experts = text.partition(":")
        pins.setdefault(int(layer), set()).update(map(int, experts.split(",")))
    return pins
