"""``collegium import-trace``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from importer_files import LAYERS, WRITERS, E, K, Run, assert_is
from typer.testing import CliRunner

from collegium.cli.main import app
from collegium.errors import ConfigError, DataError
from collegium.trace import Trace, record
from tiny import tiny_inputs, tiny_model


def run(*arguments: object) -> dict:
    command = ["import-trace", *map(str, arguments), "--json"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("format", sorted(WRITERS))
def test_options_say_what_the_files_do_not(tmp_path: Path, format: str) -> None:
    made = Run()
    files = WRITERS[format](tmp_path, made)
    (tmp_path / "ids.txt").write_text("\n".join(map(str, made.tokens)))
    tokens = ["--tokens", tmp_path / "ids.txt"] if format == "llama.cpp" else []
    options = ["--layers", "1-2,4", "--num-experts", E, "--top-k", K, *tokens]
    found = run(format, *files, "--out", tmp_path / "t", *options)
    assert found["layers"] == list(LAYERS)
    assert found["tokens"] == len(made.tokens)
    assert all(note in Trace.open(tmp_path / "t").meta.data for note in found["notes"])
    assert_is(Trace.open(tmp_path / "t"), made)


def test_notes_are_on_standard_error(tmp_path: Path) -> None:
    files = WRITERS["vllm"](tmp_path, Run())
    options = ["--out", tmp_path / "t", "--num-experts", E]
    result = CliRunner().invoke(app, ["import-trace", "vllm", *map(str, [*files, *options])], catch_exceptions=False)
    assert "note: combine weights were not recorded" in result.stderr
    assert f"{len(Run().tokens)} tokens of 3 layers" in result.stdout


def test_the_model_folder_is_enough(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", num_experts=E, num_experts_per_tok=K)
    model.save_pretrained(tmp_path / "model")
    inputs = tiny_inputs(model)
    asked = record(model, [inputs], tmp_path / "recorded")
    ids = inputs["input_ids"]
    experts = [[asked.experts(layer)[n].tolist() for layer in asked.layers] for n in range(ids.numel())]
    S = ids.shape[1]
    lines = [
        {
            "prompt_token_ids": row.tolist(),
            "choices": [{"token_ids": [1], "routed_experts": experts[b * S : b * S + S]}],
        }
        for b, row in enumerate(ids)
    ]
    (tmp_path / "responses.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run("vllm", tmp_path / "responses.jsonl", "--out", tmp_path / "t", "--model", tmp_path / "model")
    trace = Trace.open(tmp_path / "t")
    assert trace.meta.family == "qwen3_moe"
    assert trace.meta.fingerprint
    with torch.no_grad():
        logits = model(**inputs, output_router_logits=True).router_logits
    torch.save({"input_ids": ids, "router_logits": logits}, tmp_path / "forward.pt")
    run("router-logits", tmp_path / "forward.pt", "--out", tmp_path / "u", "--model", tmp_path / "model")
    for found in (trace, Trace.open(tmp_path / "u")):
        assert (found.tokens() == asked.tokens()).all()
        for layer in asked.layers:
            assert (found.experts(layer) == asked.experts(layer)).all()


def test_bad_options(tmp_path: Path) -> None:
    files = WRITERS["vllm"](tmp_path, Run())
    (tmp_path / "ids.txt").write_text("1, 2, x")
    for options, kind, message in (
        (["--layers", "1-x"], ConfigError, "--layers must be"),
        (["--tokens", tmp_path / "ids.txt"], DataError, r"ids\.txt must hold token ids"),
    ):
        command = ["import-trace", "vllm", *files, "--out", tmp_path / "t", *options]
        with pytest.raises(kind, match=message):
            CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
