"""A run that is killed and resumed ends with the same bits as one that never was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from collegium.cli.main import app
from collegium.errors import ConfigError
from collegium.train import Recipe, read_metrics, train
from collegium.train.state import latest

KILL_IN_STEP = """
import os, signal, sys
from collegium.train import Recipe, loop, train
def killed(model, step, real=loop.after_step):
    real(model, step)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
loop.after_step = killed
train(Recipe.load(sys.argv[1]), sys.argv[2])
"""

KILL_IN_CHECKPOINT = """
import os, signal, sys
from collegium.train import Recipe, state, train
def killed(tensors, path, real=state.save_file):
    real(tensors, path)
    os.kill(os.getpid(), signal.SIGKILL)
state.save_file = killed
train(Recipe.load(sys.argv[1]), sys.argv[2])
"""


def test_killed_twice_and_resumed_is_bit_identical(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    plan = recipe(
        run__eval_every=3,
        moe__balance={"load_balancing": 0.01, "bias_update_rate": 0.01},
        moe__scoring_func="sigmoid",
        model__config={"initializer_range": 0.2, "attention_dropout": 0.1},  # draws from the global generator
    )
    (tmp_path / "plan.yaml").write_text(plan.dump())
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for script in (KILL_IN_STEP, KILL_IN_CHECKPOINT):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "plan.yaml"), str(killed)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == -9, done.stderr
        assert latest(killed / "checkpoints")[1].step == 4  # type: ignore[index]
    assert len(list((killed / "checkpoints").glob(".partial-*"))) == 1
    # the second life ran on to step 8 before it died: these lines must not stay
    assert read_metrics(killed / "metrics.jsonl").filter(event="step")["step"].max() == 8
    train(plan, killed)
    train(plan, whole)
    for file in ("model/model.safetensors", "checkpoints/step-00000012/optimizer.safetensors"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    drop = ["seconds", "tokens_per_second"]
    ours, theirs = (read_metrics(folder / "metrics.jsonl").drop(drop) for folder in (killed, whole))
    assert ours.equals(theirs)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("checkpoint_every", [2, 0], ids=["with checkpoints", "finished, without"])
def test_a_run_does_not_go_on_with_another_router(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, checkpoint_every: int
) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(settings(run__steps=4, run__checkpoint_every=checkpoint_every)))
    out = tmp_path / "run"

    def run(*fields: str) -> None:
        arguments = ["train", str(tmp_path / "plan.yaml"), *fields, "--out", str(out)]
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0

    run("moe.router=ssr")
    before = contents(out)
    assert ("checkpoints/step-00000004/state.json" in before) == (checkpoint_every > 0)
    with pytest.raises(ConfigError) as refused:
        run("moe.router=moge")
    for words in (
        str(out),
        "(its value != the one given)",
        "moe.router.transforms: [{'selective_sinkhorn': {'probability': 0.01,",
        "moe.router.select.grouped_top_k.groups: None != 2",
        "moe.balance.load_balancing: 0.0 != 0.01",
        "start afresh (--fresh, or resume=False)",
    ):
        assert words in str(refused.value)
    with pytest.raises(ConfigError, match=r"selective_sinkhorn.*0\.01.* != .*selective_sinkhorn.*0\.5"):
        run("moe.router={ssr: {probability: 0.5}}")
    assert contents(out) == before
    run("moe.router=ssr")  # which is the same run, finished
    assert contents(out) == before
