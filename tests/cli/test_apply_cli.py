"""``collegium apply``: a plan file and a folder in, a smaller folder out, errors on one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from folders import model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from collegium.cli.main import app, main
from collegium.models.checkpoint import open_checkpoint
from pruning import plan_of


@pytest.fixture
def planned(tmp_path: Path) -> tuple[Path, Path]:
    """A model with a tokenizer, and a plan for it in a file."""
    source = model_folder(tmp_path)
    plan = plan_of(source, notes=("expert 3 of layer 0 saw no token",))
    plan.save(tmp_path / "plan.json")
    return source, tmp_path / "plan.json"


def test_a_plan_becomes_a_smaller_model(tmp_path: Path, planned: tuple[Path, Path]) -> None:
    source, plan = planned
    out = tmp_path / "out"
    arguments = ["apply", str(plan), "--model", str(source), "--out"]
    result = CliRunner().invoke(app, [*arguments, str(out), "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert "saw no token" in result.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    assert record["parameters"] == model.num_parameters() < record["of_parameters"]
    assert (record["layers"], record["experts"], record["of_experts"]) == (2, 4, 8)
    assert record["nbytes"] < record["of_nbytes"]
    assert record["fingerprint"] == open_checkpoint(out).fingerprint
    assert AutoTokenizer.from_pretrained(out)("a b").input_ids
    printed = CliRunner().invoke(app, [*arguments, str(tmp_path / "again")]).stdout
    assert printed.startswith("4 of 8 experts in each of 2 layers, ")
    assert f"{record['parameters']:,} of {record['of_parameters']:,} parameters" in printed


def test_errors_are_one_line(tmp_path: Path, planned: tuple[Path, Path], monkeypatch, capsys) -> None:
    source, plan = planned
    (tmp_path / "bad.json").write_text("{}")
    for file, folder, message in ((tmp_path / "bad.json", source, "bad.json"), (plan, tmp_path / "none", "no model")):
        monkeypatch.setattr(sys, "argv", ["collegium", "apply", str(file), "--model", str(folder), "--out", "o"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert message in lines[-1]
        assert lines[-1].startswith("collegium: error: ")
