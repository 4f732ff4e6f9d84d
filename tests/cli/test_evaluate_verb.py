"""``collegium evaluate``: a model and held-out text in, tables or JSON out; bad input is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from folders import VOCABULARY, corpus_folder, model_folder
from test_inspect import refused
from typer.testing import CliRunner

from collegium.cli import evaluate
from collegium.cli.main import app
from collegium.compress import judge_memory
from collegium.compress.judge_result import Judgement
from collegium.data import open_corpus, train_tokenizer
from pruning import plan_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"))


def run(model: Path, *arguments: object) -> str:
    command = ["evaluate", model, "--data", corpus_folder(), "--split", "all", *arguments]
    result = CliRunner().invoke(app, list(map(str, command)), env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_one_model(model: Path, tmp_path: Path) -> None:
    printed = run(model, "--out", tmp_path / "found.json")
    found = Judgement.load(tmp_path / "found.json")
    assert found.model == str(model)
    assert found.whole is None
    for one in (*found.domains, found.overall):
        assert f"{one.perplexity:,.2f}" in printed
        assert f"{one.bits_per_byte:.3f}" in printed
    assert "KL" not in printed
    assert found.continuations[0].prompt.split()[0] in printed
    assert json.loads(run(model, "--json"))["overall"] == found.overall.record()


def test_a_plan_as_a_mask_and_what_it_makes(model: Path, tmp_path: Path) -> None:
    plan_of(model).save(tmp_path / "plan.json")
    out = ["apply", tmp_path / "plan.json", "--model", model, "--out", tmp_path / "small"]
    assert CliRunner().invoke(app, list(map(str, out))).exit_code == 0
    masked = json.loads(run(model, "--plan", tmp_path / "plan.json", "--json"))
    small = json.loads(run(tmp_path / "small", "--against", model, "--json"))
    assert masked["masked"]
    assert masked["overall"]["loss"]["value"] == pytest.approx(small["overall"]["loss"]["value"], abs=1e-5)
    assert masked["overall"]["whole_loss"] == pytest.approx(small["overall"]["whole_loss"])
    assert small["layers"][0]["agreement"]["value"] == 1, "the maps are those of the edit"
    printed = run(tmp_path / "small", "--against", model)
    assert "4 of 8" in printed
    assert f"{small['layers'][1]['output_error']['value']:.3f}" in printed
    assert f"{small['overall']['kl']['value']:.4f}" in printed
    for name in evaluate._SHOWN:
        assert name in printed


def test_bad_input_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("evaluate", model, "--data", corpus_folder())

    def error(*arguments: object) -> str:
        return refused(monkeypatch, capsys, *command, *arguments)

    assert "no split is named 'some'" in error("--split", "some")
    assert "the test split of the corpus" in error(), "two documents a domain leave nothing for it"
    assert "no model folder" in error("--against", tmp_path / "none")
    other = shutil.copytree(model, tmp_path / "other")
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_text("zyx wvu tsr qpo nml " * 4 + str(number))
    train_tokenizer(open_corpus(str(tmp_path / "texts")), VOCABULARY, tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", other, dirs_exist_ok=True)
    assert "different tokenizers" in error("--against", other)
    plan_of(model).save(tmp_path / "plan.json")
    assert "leave out --against" in error("--against", other, "--plan", tmp_path / "plan.json")
    changed = model_folder(tmp_path, seed=5)
    plan_of(changed).save(tmp_path / "plan.json")
    assert "it is another model" in error("--plan", tmp_path / "plan.json", "--split", "all")
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused(monkeypatch, capsys, "evaluate", model, "--data", tmp_path / "empty")
    monkeypatch.setattr(judge_memory, "available_bytes", lambda: 1000)
    assert "GB of memory" in error("--split", "all")
