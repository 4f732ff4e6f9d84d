from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from collegium import models
from collegium.errors import ConfigError, DataError, NonFiniteError, StorageError
from collegium.layer import moe_layers
from collegium.train import Recipe, evaluate, loop, read_metrics, state, train
from collegium.train.prepare import prepare
from collegium.train.ranks import Ranks
from collegium.train.state import latest
from collegium.train.stop import StopRequest

Make = Callable[..., Recipe]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def test_a_run_learns_and_leaves_everything_that_is_needed(recipe: Make, tmp_path: Path) -> None:
    plan = recipe(run__steps=40, run__eval_every=20, run__checkpoint_every=15, run__keep_checkpoints=2)
    summary = train(plan, tmp_path)
    table = read_metrics(tmp_path / "metrics.jsonl")
    steps, evals = (table.filter(table["event"] == event) for event in ("step", "eval"))
    assert steps["step"].to_list() == list(range(1, 41))
    assert evals["step"].to_list() == [20, 40]
    assert steps["tokens"].to_list()[-1] == 40 * 8 * 32 == summary["tokens"]
    assert steps["loss"][-1] < 0.7 * steps["loss"][0]
    for column in ("load_balancing", "max_violation", "dead_experts", "grad_norm", "tokens_per_second"):
        assert steps[column].null_count() == 0
    assert steps["lr"].max() == plan.optim.lr
    assert evals["bits_per_byte"][-1] == summary["bits_per_byte"] < evals["bits_per_byte"][0]

    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert set(summary["domains"]) == {"count", "song"}
    assert summary["parameters"]["active"] < summary["parameters"]["total"]
    assert Recipe.load(tmp_path / "recipe.yaml") == plan
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000030", "step-00000040"]

    # what was saved is what was evaluated
    model = models.load(tmp_path / "model")
    assert len(moe_layers(model)) == 2
    data = prepare(plan, Ranks())
    again = evaluate(model, data.valid, data.token_bytes, 4)
    assert again.overall == pytest.approx(summary["bits_per_byte"], rel=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 300


def test_saving_in_bfloat16_evaluates_the_rounded_weights(recipe: Make, tmp_path: Path) -> None:
    plan = recipe(run__steps=2, run__save_dtype="bfloat16", moe__balance={"bias_update_rate": 0.1})
    summary = train(plan, tmp_path)
    stored = weights(tmp_path)
    kinds = {tensor.dtype for name, tensor in stored.items() if "e_score_correction_bias" not in name}
    assert kinds == {torch.bfloat16}
    data = prepare(plan, Ranks())
    again = evaluate(
        models.load(tmp_path / "model", dtype=torch.float32), data.valid, data.token_bytes, 4, mask_documents=True
    )
    assert again.overall == pytest.approx(summary["bits_per_byte"], rel=1e-5)


def test_a_dense_model_trains_too(recipe: Make, tmp_path: Path) -> None:
    summary = train(recipe(moe=None, run__steps=2), tmp_path)
    assert summary["parameters"]["active"] == summary["parameters"]["total"]
    assert "max_violation" not in read_metrics(tmp_path / "metrics.jsonl").columns


def test_a_run_can_start_from_a_finished_model(recipe: Make, tmp_path: Path) -> None:
    first = train(recipe(run__steps=10), tmp_path / "first")
    more = recipe(model={"checkpoint": str(tmp_path / "first" / "model")}, moe=None, run__steps=10)
    second = train(more, tmp_path / "second")
    assert second["parameters"] == first["parameters"]
    assert second["bits_per_byte"] < first["bits_per_byte"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_micro_batches_change_the_result_by_rounding_only(recipe: Make, tmp_path: Path, precision: str) -> None:
    # everything that pools over the batch except the global loss, which sees partial counts by definition
    balance = {"load_balancing": 0.0, "z_loss": 0.1, "bias_update_rate": 0.05}
    shared = {"moe__balance": balance, "moe__scoring_func": "sigmoid", "run__steps": 5, "run__precision": precision}
    if precision == "float32":
        shared["optim__eps"] = 1e-5  # or Adam makes a part of a step of a gradient that is zero but for rounding
    train(recipe(**shared), tmp_path / "whole")
    train(recipe(**shared, run__accumulate=4), tmp_path / "parts")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, tensor in whole.items():
        tolerance = 1e-5 if precision == "float32" else 2e-2
        torch.testing.assert_close(parts[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    if precision == "float32":
        bias = next(name for name in whole if "e_score_correction_bias" in name)
        assert torch.equal(whole[bias], parts[bias])
        assert whole[bias].abs().max() > 0


def test_a_batch_that_cannot_be_split_is_refused(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch_size 8 .* 3 micro-batches"):
        train(recipe(run__accumulate=3), tmp_path)


def test_masked_documents_train(recipe: Make, tmp_path: Path) -> None:
    train(recipe(run__steps=1), tmp_path / "masked")
    train(recipe(run__steps=1, data__mask_documents=False), tmp_path / "open")
    masked, open_ = (read_metrics(tmp_path / name / "metrics.jsonl")["loss"] for name in ("masked", "open"))
    # one in six tokens is in a second document of its sequence, at random weights that hardly shows
    assert masked[0] != open_[0]
    assert masked[0] == pytest.approx(open_[0], rel=0.05)


@pytest.mark.slow
def test_compiling_changes_the_result_by_rounding_only(recipe: Make, tmp_path: Path) -> None:
    plain = train(recipe(run__steps=5, run__eval_every=2), tmp_path / "plain")
    fused = train(recipe(run__steps=5, run__eval_every=2, run__compile=True), tmp_path / "fused")
    assert fused["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=1e-4)
    assert set(weights(tmp_path / "plain")) == set(weights(tmp_path / "fused"))


def test_nan_stops_the_run_and_names_the_step_and_the_tensor(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.after_step

    def poison(model: Any, step: int) -> None:
        real(model, step)
        if step == 4:
            with torch.no_grad():
                model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = float("nan")

    monkeypatch.setattr(loop, "after_step", poison)
    with pytest.raises(NonFiniteError, match=r"step 6: .*parameter model\.layers\.1\.mlp\.experts\.down_proj"):
        train(recipe(), tmp_path)
    found = latest(tmp_path / "checkpoints")
    assert found is not None
    assert found[1].step == 4


def test_ctrl_c_finishes_the_step_writes_a_checkpoint_and_the_run_goes_on(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = loop.after_step

    def interrupt(model: Any, step: int) -> None:
        real(model, step)
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(loop, "after_step", interrupt)
    stopped = train(recipe(run__checkpoint_every=0), tmp_path / "stopped")
    monkeypatch.setattr(loop, "after_step", real)
    assert stopped["interrupted"]
    assert f"stopped after step {stopped['step']}" in capfd.readouterr().err
    assert 5 <= stopped["step"] <= 6
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "stopped" / "summary.json").exists()
    train(recipe(run__checkpoint_every=0), tmp_path / "stopped")
    train(recipe(run__checkpoint_every=0), tmp_path / "whole")
    ours, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert read_metrics(tmp_path / "stopped" / "metrics.jsonl").filter(event="step")["step"].to_list() == [
        *range(1, 13)
    ]


def test_a_second_ctrl_c_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)  # asking twice to terminate is still asking
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_resuming_with_another_recipe_is_refused_by_field(recipe: Make, tmp_path: Path) -> None:
    train(recipe(run__steps=4), tmp_path)
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.003 != 0\.1"):
        train(recipe(run__steps=4, optim__lr=0.1), tmp_path)
    with pytest.raises(ConfigError, match="at step 4, beyond the 3 steps"):
        train(recipe(run__steps=3), tmp_path)
    # run length and logging may change; fresh starts over
    longer = train(recipe(run__steps=8, run__log_every=2), tmp_path)
    assert longer["steps"] == 8
    steps = read_metrics(tmp_path / "metrics.jsonl").filter(event="step")["step"].to_list()
    assert steps == [1, 2, 3, 4, 6, 8]
    (tmp_path / "mine.txt").write_text("not the run's")
    assert train(recipe(run__steps=8, run__log_every=2), tmp_path) == longer
    train(recipe(run__steps=4, optim__lr=0.1), tmp_path, resume=False)
    assert read_metrics(tmp_path / "metrics.jsonl").filter(event="step").height == 4
    assert (tmp_path / "mine.txt").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 0.9 MB, where the tests may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "none", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(recipe: Make, small_disk: Path) -> None:
    with pytest.raises(StorageError, match=r"No space left.*untouched"):
        train(recipe(run__keep_checkpoints=0), small_disk)
    found = latest(small_disk / "checkpoints")
    assert found is not None
    path, progress = found
    assert progress.step < 12
    assert sorted(p.name for p in path.parent.iterdir()) == [
        f"step-{step:08d}" for step in range(4, progress.step + 1, 4)
    ]
    assert len(moe_layers(models.load(path / "model"))) == 2


def test_a_checkpoint_that_was_cut_short_is_passed_over(recipe: Make, tmp_path: Path) -> None:
    train(recipe(run__steps=8), tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000008"
    (tmp_path / "checkpoints" / "step-00000009").mkdir()
    assert latest(tmp_path / "checkpoints")[0] == newest  # type: ignore[index]
    whole = (newest / "optimizer.safetensors").read_bytes()
    (newest / "optimizer.safetensors").write_bytes(whole[:-1])
    assert latest(tmp_path / "checkpoints")[1].step == 4  # type: ignore[index]
    assert state.latest(tmp_path / "nothing") is None


def test_resuming_on_other_text_is_refused(recipe: Make, corpus: Path, tmp_path: Path) -> None:
    own = tmp_path / "corpus"
    shutil.copytree(corpus, own)
    train(recipe(data__corpus=str(own), run__steps=4), tmp_path / "run")
    (own / "train" / "song" / "new.txt").write_text("a song that was not there before", encoding="utf-8")
    with pytest.raises(DataError, match="other text"):
        train(recipe(data__corpus=str(own), run__steps=8), tmp_path / "run")


def test_a_finished_run_is_not_run_again_nor_overwritten(
    recipe: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = recipe(run__steps=2, run__checkpoint_every=0)
    first = train(plan, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    capfd.readouterr()
    assert train(plan, tmp_path) == first
    assert "finished" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="finished run of another recipe"):
        train(recipe(run__steps=3, run__checkpoint_every=0), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "summary.json").read_text()) == first
