"""``collegium profiles``: profiles of statistics, the domain of a text, and text from its experts only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import TEXTS, corpus_folder, model_folder
from test_inspect import refused
from typer.testing import CliRunner

from collegium.cli.main import app
from collegium.compress.profiles import Profiles
from collegium.models.checkpoint import open_checkpoint


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def statistics(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "s"
    run("calibrate", model, "--data", corpus_folder(), "--out", out)
    return out


def test_profiles_of_statistics_and_the_domain_of_a_text(model: Path, statistics: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    found = json.loads(run("profiles", statistics, "--out", file, "--json"))
    assert found["tasks"] == sorted(TEXTS)
    assert found["fingerprint"] == open_checkpoint(model).fingerprint
    stored = Profiles.load(file)
    assert stored.meta.tasks == tuple(found["tasks"])
    for task, texts in TEXTS.items():
        match = json.loads(run("profiles", file, "--model", model, "--query", texts[0], "--json"))
        assert match["task"] == task
        assert list(match["distances"])[0] == task  # noqa: RUF015
        near = json.loads(
            run("profiles", file, "--model", model, "--query", texts[0], "--distance", "cosine", "--json")
        )
        assert near["distances"] != match["distances"]
    assert "experts ranked by tcess" in run("profiles", file)
    shown = run("profiles", file, "--model", model, "--query", TEXTS["sums"][0])
    assert shown.index("sums") < shown.index("prose")


def test_text_from_the_experts_of_the_task_only(model: Path, statistics: Path) -> None:
    command = ("profiles", statistics, "--model", model, "--query", "1 + 1", "--generate", "--max-new-tokens", 12)
    few, all_of_them = (json.loads(run(*command, "--keep", keep, "--json"))["text"] for keep in (0.25, 1.0))
    whole = json.loads(run("generate", model, "1 + 1", "--greedy", "--max-new-tokens", 12, "--json"))
    assert all_of_them == whole["text"]
    assert few != all_of_them


def test_bad_input_is_one_line(
    model: Path,
    statistics: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "p.safetensors"
    run("profiles", statistics, "--out", file)
    assert "--overwrite" in refused(monkeypatch, capsys, "profiles", statistics, "--out", file)
    run("profiles", statistics, "--out", file, "--overwrite", "--method", "reap")
    assert Profiles.load(file).meta.importance == "reap"
    assert "both have a task" in refused(monkeypatch, capsys, "profiles", statistics, "--method", "reap", "--add", file)
    assert "--model" in refused(monkeypatch, capsys, "profiles", file, "--query", "text")
    assert "--query" in refused(monkeypatch, capsys, "profiles", file, "--generate")
    query = ("profiles", file, "--query", "text", "--model")
    assert "--distance 'far'" in refused(monkeypatch, capsys, *query, model, "--distance", "far")
    other = model_folder(tmp_path, seed=1)
    assert "make profiles of this model" in refused(monkeypatch, capsys, *query, other)
    file.write_bytes(b"nothing")
    assert "no profiles" in refused(monkeypatch, capsys, "profiles", file)
