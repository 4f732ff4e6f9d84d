"""``collegium recover``: a better model, or none and exit status 1; bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_inspect import refused
from typer.testing import CliRunner

from collegium.cli.main import app
from collegium.compress.recover import run as recover_run
from collegium.models.checkpoint import open_checkpoint
from recovering import LENGTH, corpus, pair

SMALL = (
    "--tokens",
    6 * 4 * LENGTH,
    "--lr",
    "3e-3",
    "--batch-size",
    4,
    "--sequence-length",
    LENGTH,
    "--kd",
    "0.5",
    "0.25",
)


def run(out: Path, *arguments: object, status: int = 0) -> str:
    student, teacher = pair()
    command = ["recover", student, "--teacher", teacher, "--data", corpus().name, "--out", out, *SMALL, *arguments]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == status, result.output
    return result.stdout if status in (0, 1) else result.stderr


def test_a_better_model(tmp_path: Path) -> None:
    found = json.loads(run(tmp_path / "out", "--json"))
    assert found["kept"]
    assert found["after"] < found["before"]
    assert found["out"] == str(tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").tensors
    text = run(tmp_path / "other", "--only", "router", "--store", tmp_path / "store")
    assert "song" in text
    assert f"the model is in {tmp_path / 'other'}" in text
    assert (tmp_path / "store" / "store.json").is_file()


def test_nothing_is_written_where_nothing_was_gained(tmp_path: Path) -> None:
    found = json.loads(run(tmp_path / "out", "--lr", "1e-30", "--json", status=1))
    assert not found["kept"]
    assert found["out"] is None
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recover_run, "clip_", stopped)
        assert f"{tmp_path / 'out'}.partial, the same command goes on" in run(tmp_path / "out", status=130)
    assert json.loads(run(tmp_path / "out", "--json"))["kept"]


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = pair()
    command = ("recover", student, "--data", corpus().name, "--out", tmp_path / "out", *SMALL)
    assert "must be a teacher" in refused(monkeypatch, capsys, *command)
    command = (*command, "--teacher", teacher)
    assert "--only 'experts'" in refused(monkeypatch, capsys, *command, "--only", "experts")
    assert "--teacher-dtype 'int8'" in refused(monkeypatch, capsys, *command, "--teacher-dtype", "int8")
    assert "no model folder" in refused(monkeypatch, capsys, "recover", tmp_path / "none", *command[2:])
    assert "exists" in refused(monkeypatch, capsys, *command[:4], "--out", teacher, *command[6:])
