from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from collegium.cli.main import app
from collegium.errors import ConfigError


@pytest.fixture
def plan(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(settings(run__steps=2)))
    return tmp_path / "plan.yaml"


def test_train_with_overrides_and_json(plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", str(plan), "--out", str(out), "run.steps=3", "optim.lr=1e-4", "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["steps"] == 3
    assert json.loads((out / "summary.json").read_text()) == summary
    assert yaml.safe_load((out / "recipe.yaml").read_text())["optim"]["lr"] == 1e-4


def test_the_twin_is_dense_and_the_table_names_every_domain(plan: Path, tmp_path: Path) -> None:
    arguments = ["train", str(plan), "-o", str(tmp_path / "twin"), "--dense-twin"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    for word in ("count", "song", "all", "per token"):
        assert word in result.stdout
    assert "moe" not in yaml.safe_load((tmp_path / "twin" / "recipe.yaml").read_text())


def test_a_bad_override_is_a_setting_error(plan: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plan\.yaml: optim\.lr"):
        CliRunner().invoke(app, ["train", str(plan), "-o", str(tmp_path / "x"), "optim.lr=no"], catch_exceptions=False)
    assert not (tmp_path / "x").exists()


def test_an_interrupted_run_exits_with_130(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collegium import train

    monkeypatch.setattr(train, "train", lambda *a, **k: {"interrupted": True, "step": 1})
    result = CliRunner().invoke(app, ["train", str(plan), "-o", str(tmp_path / "x")])
    assert result.exit_code == 130
