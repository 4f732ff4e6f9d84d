"""``collegium apply --own``, and the verbs' way of opening what it wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from collegium.cli._model import open_model
from collegium.cli.main import app, main
from collegium.compress.factor import factor_plan
from collegium.compress.mask import apply_mask
from collegium.models import load
from pruning import logits, plan_of, saved


@pytest.fixture
def uneven(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a plan that leaves its layers with three and four experts."""
    source = saved(tmp_path, "qwen3_moe")
    plan_of(source, {0: (0, 3, 5), 1: (1, 2, 4, 6)}).save(tmp_path / "plan.json")
    return source, tmp_path / "plan.json"


def test_a_plan_for_our_own_loader(tmp_path: Path, uneven: tuple[Path, Path]) -> None:
    source, plan = uneven
    out = tmp_path / "out"
    arguments = ["apply", str(plan), "--model", str(source), "--own", "--out"]
    result = CliRunner().invoke(app, [*arguments, str(out), "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["format"], record["experts"], record["of_experts"]) == ("own", [3, 4], 8)
    model = open_model(out, dtype=None, device=None, trust_remote_code=False)
    assert record["parameters"] == model.num_parameters() < record["of_parameters"]
    whole = load(source)
    with apply_mask(whole, plan_of(source, {0: (0, 3, 5), 1: (1, 2, 4, 6)})):
        torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)
    assert open_model(out, dtype="bfloat16", device="cpu", trust_remote_code=False).dtype == torch.bfloat16
    printed = CliRunner().invoke(app, [*arguments, str(tmp_path / "again")]).stdout
    assert printed.startswith("3 to 4 of 8 experts in each of 2 layers, ")
    assert "own format" in printed


def test_a_portable_plan_stays_plain(tmp_path: Path) -> None:
    source = saved(tmp_path, "qwen3_moe")
    plan_of(source).save(tmp_path / "plan.json")
    arguments = ["apply", str(tmp_path / "plan.json"), "--model", str(source), "--own", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(result.stdout)["format"] == "transformers"
    assert load(tmp_path / "out").config.model_type == "qwen3_moe"


def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["collegium", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_both_ways_out_are_named(tmp_path: Path, uneven: tuple[Path, Path], monkeypatch, capsys) -> None:
    source, plan = uneven
    message = error_of(monkeypatch, capsys, "apply", plan, "--model", source, "--out", tmp_path / "out")
    assert "--own" in message
    assert "mask" in message
    assert not (tmp_path / "out").exists()


def test_statistics_are_asked_for(tmp_path: Path, monkeypatch, capsys) -> None:
    source = saved(tmp_path, "qwen3_moe")
    plan = factor_plan(source).model_dump(mode="json")
    plan["operator"]["name"] = "whitened_svd"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    arguments = ("apply", tmp_path / "plan.json", "--model", source, "--own", "--out", tmp_path / "out")
    assert "c_in, h_sq" in error_of(monkeypatch, capsys, *arguments)
    message = error_of(monkeypatch, capsys, *arguments, "--statistics", tmp_path)
    assert "holds no statistics" in message
