"""Running an arena: every method with every seed, one training run after another, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from collegium.arena.plan import ArenaPlan
from collegium.arena.score import SCORE, score_run
from collegium.arena.speed import SPEED, training_speed
from collegium.errors import CollegiumError, ConfigError
from collegium.files import atomic_file
from collegium.train import Recipe
from collegium.train.stop import StopRequest

__all__ = ["run_arena", "run_folder"]

Say = Callable[[str], None]


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Where the run of a method with a seed is."""
    return out / "runs" / f"{name}-seed{seed}"


def run_arena(plan: ArenaPlan, out: str | Path, *, say: Say = print) -> bool:
    """Train and measure what is not done yet; then the speed of all methods, in turns.

    Runs are those of ``collegium train``; each resumes after an interruption, and what is finished is not done again.
    A method that fails leaves the others alone. Checkpoints are removed once a run is measured.

    Args:
        plan: what to compare.
        out: folder; runs go to ``out/runs``.
        say: told a line about each run.

    Returns:
        whether all is done; False after SIGINT or SIGTERM, when the run at hand has written a checkpoint.

    Raises:
        ConfigError: `out` holds a run of another recipe.
        CollegiumError: runs failed; the message names them. What finished is kept.
    """
    out = Path(out)
    todo = [(name, seed) for seed in plan.seeds for name in plan.names]
    failed = []
    for number, (name, seed) in enumerate(todo, 1):
        folder, recipe = run_folder(out, name, seed), plan.recipe(name, seed)
        if _scored(folder, recipe, plan.probe):
            continue
        say(f"arena {number}/{len(todo)}: {name}, seed {seed}")
        status = _train(recipe, folder)
        if status == 130:
            return False
        try:
            if status:
                raise CollegiumError(f"training ended with exit status {status}; its messages are above")
            score_run(folder, recipe, plan.probe)
        except CollegiumError as error:
            failed.append(f"{name}, seed {seed}: {error}")
            say(f"failed: {failed[-1]}")
    recipes = {name: plan.recipe(name, plan.seeds[0]) for name in plan.names}
    if not _same(out / SPEED, recipes):
        say("arena: speed of all methods, in turns")
        found = training_speed(recipes)
        record = {
            "recipes": {name: one.plain() for name, one in recipes.items()},
            "threads": torch.get_num_threads(),
            "tokens_per_second": found,
        }
        with atomic_file(out / SPEED) as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if failed:
        raise CollegiumError(f"{len(failed)} of {len(todo)} runs failed: {'; '.join(failed)}")
    return True


def _scored(folder: Path, recipe: Recipe, probe: int) -> bool:
    file = folder / SCORE
    if not file.is_file():
        return False
    known = json.loads(file.read_text(encoding="utf-8"))
    # parsed, since a field that did not exist when it was written has its default
    if Recipe.parse(known["recipe"], where=str(file)) != recipe:
        raise ConfigError(f"{folder} holds a run of another recipe; remove it or use another folder")
    return bool(known["probe"] == probe)


def _same(file: Path, recipes: dict[str, Recipe]) -> bool:
    """Whether the speeds are of these recipes."""
    if not file.is_file():
        return False
    known = json.loads(file.read_text(encoding="utf-8"))["recipes"]
    return {name: Recipe.parse(plain, where=str(file)) for name, plain in known.items()} == recipes


def _train(recipe: Recipe, folder: Path) -> int:
    """Exit status of ``collegium train``. A process of its own tells the memory of this run from that of others; it is
    out of reach of the terminal's Ctrl-C, which is handed on once, so that it writes a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "plan.yaml"
    with atomic_file(file) as partial:
        partial.write_text(recipe.dump(), encoding="utf-8")
    command = [sys.executable, "-m", "collegium", "train", str(file), "--out", str(folder), "--json"]
    with StopRequest() as stop:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            asked = False
            while True:
                try:
                    return child.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    if stop.requested and not asked:
                        child.terminate()
                        asked = True
        except BaseException:
            child.kill()
            raise
