"""``collegium report``: a trace in, a page out; what does not belong together is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import corpus_folder, model_folder
from test_inspect import refused
from typer.testing import CliRunner

from collegium.cli.main import app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def trace(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("traces") / "t"
    run("trace", model, "--data", corpus_folder(), "--out", out, "--logits")
    return out


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_page_pictures_and_numbers(model: Path, trace: Path, tmp_path: Path) -> None:
    page, pictures = tmp_path / "page.html", tmp_path / "pictures"
    found = json.loads(
        run("report", trace, "--out", page, "--model", model, "--png", pictures, "--compare", trace, "--json")
    )
    html = page.read_text()
    assert "router" in html, "the text of the tokens"
    assert "one expert" in html, "the sizes of the model"
    assert {"load", "confidence", "redundancy", "super-experts", "fluctuation"} <= found["metrics"].keys()
    assert {row["tokens with other experts"]["value"] for row in found["metrics"]["fluctuation"]} == {0.0}
    assert {Path(file).suffix for file in found["figures"]} == {".png", ".svg"}
    assert all(Path(file).stat().st_size > 1000 for file in found["figures"])
    assert found["verdict"][0]["question"] == "Is the load balanced?"
    assert found["missing"] == {}


def test_without_a_model_the_answers_are_still_there(trace: Path, tmp_path: Path) -> None:
    words = run("report", trace, "--out", tmp_path / "page.html")
    assert "Is the load balanced?" in words
    assert str(tmp_path / "page.html") in words


def test_a_tokenizer_alone_gives_text(model: Path, trace: Path, tmp_path: Path) -> None:
    found = json.loads(run("report", trace, "--out", tmp_path / "page.html", "--tokenizer", model, "--json"))
    assert "Token ids are shown" not in (tmp_path / "page.html").read_text()
    assert "redundancy" in found["missing"]


def test_another_model_is_refused(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = model_folder(tmp_path, "olmoe")
    line = refused(monkeypatch, capsys, "report", trace, "--out", tmp_path / "page.html", "--model", other)
    assert "give the model it was recorded from" in line
    assert not (tmp_path / "page.html").exists()


def test_no_trace_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "not a trace" in refused(monkeypatch, capsys, "report", tmp_path, "--out", tmp_path / "page.html")
