"""``collegium corpus`` on a small folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from collegium.cli.main import app
from collegium.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for domain in ("law", "verse"):
        (tmp_path / domain).mkdir()
        for number in range(4):
            (tmp_path / domain / f"{number}.txt").write_text(f"{domain} [bold]{number}[/bold]")
    return tmp_path


def test_json_is_the_summary(folder: Path) -> None:
    result = CliRunner().invoke(app, ["corpus", str(folder), "--json", "--sample", "verse"])
    record = json.loads(result.stdout)
    assert list(record["domains"]) == ["law", "verse"]
    assert sum(split["documents"] for split in record["domains"]["law"].values()) == 4
    assert record["sample"] == {"name": "verse/0.txt", "domain": "verse", "text": "verse [bold]0[/bold]"}


def test_table_and_sample_are_shown_as_they_are(folder: Path) -> None:
    result = CliRunner().invoke(app, ["corpus", str(folder), "--sample", "law"])
    assert result.exit_code == 0
    assert "verse" in result.stdout
    assert "law [bold]0[/bold]" in result.stdout


def test_unknown_domain_is_an_error(folder: Path) -> None:
    result = CliRunner().invoke(app, ["corpus", str(folder), "--sample", "news"])
    assert isinstance(result.exception, ConfigError)
    assert "it has law, verse" in str(result.exception)
