"""Checkpoints of a recovery: what continues it bit for bit.

    <out>.partial/run.json                      what the run is of; another run is not continued
    <out>.partial/checkpoints/step-00000050/
        parameters.safetensors                  those that are trained, float32, by their names in the live model
        optimizer.safetensors, state.json       as `collegium.train.state` writes them

The rest of the student is read from its own folder again. Random choices are keyed by the step.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from collegium.errors import CheckpointError, ConfigError
from collegium.files import PARTIAL, atomic_dir, atomic_file
from collegium.train.state import Progress, latest, load_optimizer

__all__ = ["open_work", "restore", "save_checkpoint"]

_RUN, _CHECKPOINTS, _PARAMETERS = "run.json", "checkpoints", "parameters.safetensors"


def open_work(folder: Path, run: dict[str, Any], *, resume: bool) -> None:
    """Make `folder` that of `run`: go on with what is there, or drop its checkpoints.

    Args:
        run: what decides the result, as plain JSON data.

    Raises:
        ConfigError: the folder is something else, or holds checkpoints of another run and `resume` is set.
    """
    path = folder / _RUN
    if folder.exists() and not path.is_file():
        foreign = not folder.is_dir() or any(not file.name.startswith(PARTIAL) for file in folder.iterdir())
        if foreign:
            raise ConfigError(f"{folder} is not an unfinished recovery; move it away, or choose another target")
    if not resume:
        shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)
    run = json.loads(json.dumps(run))
    if path.is_file() and latest(folder / _CHECKPOINTS) is not None:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not readable ({error}); start again with --fresh") from error
        other = [key for key in run if not isinstance(stored, dict) or stored.get(key) != run[key]]
        if other:
            raise ConfigError(
                f"{folder} is what is left of another run (it differs in {', '.join(other)}); repeat that run to "
                "continue it, or start again with --fresh"
            )
        return
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def save_checkpoint(folder: Path, at: Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write where the run is, then remove older checkpoints.

    Raises:
        StorageError: it could not be written; older checkpoints are untouched.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in trained.items()}
    target = folder / _CHECKPOINTS / f"step-{at.step:08d}"
    with atomic_dir(target) as partial:
        save_file({name: p.detach().contiguous() for name, p in trained.items()}, partial / _PARAMETERS)
        state = {
            f"{names[id(p)]}/{key}": value.contiguous()
            for p, fields in optimizer.state.items()
            for key, value in fields.items()
        }
        save_file(state, partial / "optimizer.safetensors")
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        text = json.dumps({**asdict(at), "files": sizes}, indent=2)
        (partial / "state.json").write_text(text, encoding="utf-8")
    for old in target.parent.glob("step-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put the latest checkpoint into the model and its optimizer; where it was, or the start if there is none.

    Raises:
        CheckpointError: it does not fit the model.
    """
    found = latest(folder / _CHECKPOINTS)
    if found is None:
        return Progress()
    path, at = found
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with safe_open(path / _PARAMETERS, framework="pt") as file:
        if set(file.keys()) != trained.keys():
            raise CheckpointError(f"{path / _PARAMETERS} does not hold the parameters that are trained; use --fresh")
        for name, p in trained.items():
            tensor = file.get_tensor(name)
            if tensor.shape != p.shape:
                raise CheckpointError(f"{path / _PARAMETERS}: {name!r} is {list(tensor.shape)}, not {list(p.shape)}")
            p.copy_(tensor)
    load_optimizer(path, model, optimizer)
    return at
