"""Checkpoints of a run: everything that continues it bit for bit, in safetensors and JSON.

    OUT/checkpoints/step-00001000/
        model/                     opens with `collegium.models.load`, in the precision it is trained in
        optimizer.safetensors      <parameter name>/exp_avg, /exp_avg_sq, /step
        recipe.yaml
        state.json                 step, tokens, seconds, size of the metrics file, fingerprint of the
                                   data, sizes of the other files

Random choices are keyed by step, so no generator state is kept, and the data order follows from the step. A folder is
complete as soon as it has its name; `latest` checks the sizes again, because copies can be cut short.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from collegium import models
from collegium.errors import CheckpointError
from collegium.files import atomic_dir
from collegium.train.recipe import Recipe

__all__ = ["Progress", "checkpoints", "latest", "load_optimizer", "read_recipe", "save_state"]

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps and tokens done, seconds spent, bytes of the metrics file; and on what data."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0
    data: str = ""


def save_state(
    folder: Path, recipe: Recipe, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Write one checkpoint below `folder`, then remove all but the `keep` newest (0 keeps all).

    Raises:
        StorageError: it could not be written; older checkpoints are untouched.
    """
    target = folder / f"step-{progress.step:08d}"
    with atomic_dir(target) as partial:
        models.save(model, partial / "model")
        names = {id(p): name for name, p in model.named_parameters()}
        tensors = {
            f"{names[id(p)]}/{key}": value.contiguous()
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }
        save_file(tensors, partial / "optimizer.safetensors")
        (partial / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
        sizes = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
        state = {**asdict(progress), "files": sizes}
        (partial / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    if keep:
        for _, old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def latest(folder: Path) -> tuple[Path, Progress] | None:
    """The newest complete checkpoint below `folder`, or None."""
    found = checkpoints(folder)
    if not found:
        return None
    progress, path = found[-1]
    return path, progress


def checkpoints(folder: Path) -> list[tuple[Progress, Path]]:
    """All complete checkpoints below `folder`, the earliest first."""
    named = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    found = [(progress, path) for path in named if (progress := _read(path)) is not None]
    return sorted(found, key=lambda pair: pair[0].step)


def _read(path: Path) -> Progress | None:
    """What a checkpoint says of itself; None if something of it is missing or cut short."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = state.pop("files")
        if any((path / name).stat().st_size != size for name, size in files.items()):
            return None
        return Progress(**state)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


def read_recipe(path: Path) -> Recipe:
    """The recipe a checkpoint was made with."""
    return Recipe.load(path / "recipe.yaml")


def load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the optimizer state of the checkpoint `path` into `optimizer`, which is over `model`'s parameters.

    Raises:
        CheckpointError: its file does not fit the model.
    """
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    state: dict[str, dict[str, Any]] = {}
    with safe_open(path / "optimizer.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            name, _, field = key.rpartition("/")
            p = parameters.get(name)
            tensor = file.get_tensor(key)
            if p is None or (field != "step" and tensor.shape != p.shape):
                raise CheckpointError(f"{path}/optimizer.safetensors: {key} fits no parameter of the model")
            # fused AdamW keeps its step count where the parameter is
            state.setdefault(name, {})[field] = tensor.to(p.device)
    if missing := [name for name, p in parameters.items() if p.requires_grad and name not in state]:
        raise CheckpointError(f"{path}/optimizer.safetensors: no state for {missing[0]}")
    for name, fields in state.items():
        optimizer.state[parameters[name]] = fields
