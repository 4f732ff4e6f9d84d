"""``collegium calibrate``: a checkpoint and texts in, statistics out; a stopped run goes on; bad input is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folders import TEXTS, corpus_folder, model_folder
from test_inspect import refused
from transformers import AutoTokenizer
from typer.testing import CliRunner

from collegium.cli.main import app
from collegium.compress import stream
from collegium.data.tokenize import tokenizer_fingerprint
from collegium.errors import ConfigError
from collegium.measure.statistics import Statistics
from collegium.models.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"))


def run(model: Path, out: Path, *arguments: object, status: int = 0) -> str:
    command = ["calibrate", model, "--data", corpus_folder(), "--out", out, *arguments]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def test_statistics_of_a_corpus(model: Path, tmp_path: Path) -> None:
    found = json.loads(run(model, tmp_path / "s", "--json", "--sequence-length", 8, "--batch-size", 2))
    statistics = Statistics.load(tmp_path / "s")
    assert statistics.meta.domains == tuple(sorted(TEXTS))
    assert statistics.meta.model == str(model)
    assert statistics.meta.fingerprint == open_checkpoint(model).fingerprint
    assert found["tokens"] == statistics.meta.tokens == sum(found["domains"].values())
    assert found["collectors"] == list(statistics.meta.collectors)
    assert {"counts", "router_sums", "output_norms", "down_max"} <= set(found["collectors"])
    assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "s").iterdir())
    for entry, coverage in zip(found["layers"], statistics.coverage(), strict=True):
        assert entry["starved"] == list(coverage.starved)
        assert (entry["fewest"], entry["most"]) == (int(coverage.tokens.min()), int(coverage.tokens.max()))
        assert int(coverage.tokens.sum()) == 2 * found["tokens"]
    assert found["starved"] == sum(len(entry["starved"]) for entry in found["layers"]) > 0


def test_the_report_names_starved_experts(model: Path, tmp_path: Path) -> None:
    text = run(model, tmp_path / "s", "--tokens", 20)
    starved = [f"{one.layer}.{e}" for one in Statistics.load(tmp_path / "s").coverage() for e in one.starved]
    assert f"{len(starved)} experts saw fewer than 32 tokens" in text
    assert ", ".join(starved) in text
    assert "20 tokens through 2 layers" in text
    assert "prose: 10" in text


def test_only_what_is_asked_for(model: Path, tmp_path: Path) -> None:
    found = json.loads(run(model, tmp_path / "s", "--json", "--collect", "down_max", "--collect", "reap"))
    assert sorted(found["collectors"]) == ["counts", "down_max", "output_norms"]


def test_a_neuron_score_brings_its_collectors_and_the_way_back(model: Path, tmp_path: Path) -> None:
    found = json.loads(run(model, tmp_path / "s", "--json", "--collect", "heapr"))
    assert sorted(found["collectors"]) == ["counts", "down_max", "hidden_gradients", "hidden_sums"]
    statistics = Statistics.load(tmp_path / "s")
    assert all(bool(statistics.get(layer, "dh_sq").any()) for layer in statistics.layers)


def test_a_stopped_run_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.loads(run(model, tmp_path / "whole", "--json"))
    done = []
    layer = stream._Pass._layer

    def interrupted(self: stream._Pass, number: int, feed: object) -> None:
        done.append(number)
        if done == [0, 1]:
            raise KeyboardInterrupt
        layer(self, number, feed)

    monkeypatch.setattr(stream._Pass, "_layer", interrupted)
    assert f"{tmp_path / 's'}.partial, the same command goes on" in run(model, tmp_path / "s", status=130)
    assert not (tmp_path / "s").exists()
    found = json.loads(run(model, tmp_path / "s", "--json"))
    assert done == [0, 1, 1]
    assert found["layers"] == whole["layers"]
    a, b = Statistics.load(tmp_path / "whole"), Statistics.load(tmp_path / "s")
    assert all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)


def test_bad_input_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model, tmp_path / "s", "--tokens", 8)
    command = ("calibrate", model, "--data", corpus_folder(), "--out")
    assert "--fresh" in refused(monkeypatch, capsys, *command, tmp_path / "s")
    run(model, tmp_path / "s", "--tokens", 9, "--fresh")
    assert Statistics.load(tmp_path / "s").meta.tokens == 9
    assert "no collector or score is named 'magic'" in refused(
        monkeypatch, capsys, *command, tmp_path / "t", "--collect", "magic"
    )
    assert "dtype 'int8'" in refused(monkeypatch, capsys, *command, tmp_path / "t", "--dtype", "int8")
    assert "no split" in refused(monkeypatch, capsys, *command, tmp_path / "t", "--split", "some")


def test_statistics_of_another_tokenizer_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    shutil.copytree(model, mine)
    run(mine, tmp_path / "s", "--tokens", 20)
    tokenizer = AutoTokenizer.from_pretrained(mine)
    assert Statistics.load(tmp_path / "s").meta.tokenizer == tokenizer_fingerprint(tokenizer)
    tokenizer.add_tokens(["another"])
    shutil.copytree(model, other)
    tokenizer.save_pretrained(other)
    assert open_checkpoint(other).fingerprint == open_checkpoint(mine).fingerprint
    plan = ("plan", tmp_path / "s", "--model")
    assert "another tokenizer" in refused(monkeypatch, capsys, *plan, other)
    assert CliRunner().invoke(app, [*map(str, plan), str(mine)]).exit_code == 0
    run(other, tmp_path / "t", "--tokens", 20)
    with pytest.raises(ConfigError, match="whose tokenizer differs"):
        Statistics.load(tmp_path / "s").add(Statistics.load(tmp_path / "t"))
