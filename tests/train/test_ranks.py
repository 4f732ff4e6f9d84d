"""Two processes and one do the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from collegium.train import Recipe, read_metrics, train

SCRIPT = """
import sys, torch
from collegium.train import Recipe, ranks, train
# two runs in one launch, in one process group: importing the libraries is what takes time
with ranks.open_ranks() as mine:
    for plan, out in zip(sys.argv[1::2], sys.argv[2::2]):
        train(Recipe.load(plan), out)
    # a parameter that only one process has a gradient for
    p, q = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))
    if mine.first:
        q.grad = torch.ones(3)
    p.grad = torch.full((2,), 1.0 + mine.rank)
    mine.sum_gradients_([p, q])
    assert p.grad.tolist() == [3.0, 3.0] and q.grad.tolist() == [1.0] * 3, (p.grad, q.grad)
"""

PLANS: dict[str, dict[str, Any]] = {
    "global_loss": {"moe__balance": {"load_balancing": 0.1, "scope": "global", "z_loss": 0.01}},
    "loss_free": {
        "moe__balance": {"load_balancing": 0.0, "bias_update_rate": 0.02},
        "moe__scoring_func": "sigmoid",
        "run__accumulate": 2,
        "data__mask_documents": False,
    },
}


@pytest.fixture(scope="module")
def launched(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    arguments = []
    for name, overrides in PLANS.items():
        # with the default eps AdamW turns rounding in a gradient near zero into a part of the learning rate
        plan = Recipe.parse(settings(run__steps=6, run__eval_every=3, optim__eps=1e-6, **overrides))
        (folder / f"{name}.yaml").write_text(plan.dump())
        arguments += [str(folder / f"{name}.yaml"), str(folder / name)]
    (folder / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(folder / "script.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", PLANS)
def test_two_processes_equal_one(launched: Path, tmp_path: Path, name: str) -> None:
    plan = Recipe.load(launched / f"{name}.yaml")
    one = train(plan, tmp_path)
    two, single = (load_file(folder / "model" / "model.safetensors") for folder in (launched / name, tmp_path))
    for key, tensor in single.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    tables = [read_metrics(folder / "metrics.jsonl") for folder in (launched / name, tmp_path)]
    assert tables[0]["step"].to_list() == tables[1]["step"].to_list()
    for column in ("loss", "load_balancing", "z_loss", "max_violation", "grad_norm", "bits_per_byte"):
        if column in tables[1].columns:
            ours, theirs = ([v for v in table[column] if v is not None] for table in tables)
            assert ours == pytest.approx(theirs, rel=1e-4), column
    assert one["processes"] == 1
