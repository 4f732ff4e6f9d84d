"""``collegium trace``: a corpus in, a trace out; bad input is one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folders import TEXTS, corpus_folder, model_folder
from safetensors.torch import load_file, save_file
from test_inspect import refused
from transformers import AutoTokenizer
from typer.testing import CliRunner

from collegium.cli.main import app
from collegium.models.checkpoint import open_checkpoint
from collegium.trace import Trace
from tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"))


def run(model: Path, out: Path, *arguments: object, data: object = None) -> dict[str, object]:
    source = corpus_folder() if data is None else data
    command = ["trace", model, "--data", source, "--out", out, "--json", *arguments]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_every_token_of_a_corpus_with_its_domain_and_document(model: Path, tmp_path: Path) -> None:
    found = run(model, tmp_path / "t", "--batch-size", 2, "--sequence-length", 8)
    trace = Trace.open(tmp_path / "t")
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [text for domain in sorted(TEXTS) for text in TEXTS[domain]]
    assert trace.meta.domains == ("prose", "sums")
    assert found["tokens"] == len(trace) == sum(found["domains"].values())
    assert found["layers"] == [0, 1]
    for number, text in enumerate(texts):
        ids = trace.tokens()[trace.documents() == number].tolist()
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
    assert trace.column("position").max() == 7
    assert trace.meta.fingerprint == open_checkpoint(model).fingerprint
    assert trace.meta.tokenizer
    assert trace.meta.model == str(model)


def test_sources_and_options(model: Path, tmp_path: Path) -> None:
    (tmp_path / "one.md").write_text("a single text of its own")
    run(model, tmp_path / "text", "--logits", "--gate-inputs", "0.5", data=tmp_path / "one.md")
    trace = Trace.open(tmp_path / "text")
    assert trace.meta.domains == ("one",)
    assert trace.meta.has("logits")
    assert trace.meta.has("gate_input")
    lines = [json.dumps({"text": text, "domain": domain}) for domain, texts in TEXTS.items() for text in texts]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert run(model, tmp_path / "lines", "--tokens", 11, data=tmp_path / "x.jsonl")["tokens"] == 11
    run(model, tmp_path / "generated", "--max-new-tokens", 3, "--batch-size", 3)
    assert set(Trace.open(tmp_path / "generated").column("phase")) == {0, 1}


def test_a_second_run_must_say_what_it_wants(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    run(model, tmp_path, "--tokens", 20)
    again = ("trace", model, "--data", corpus_folder(), "--out", tmp_path)
    assert "holds a trace already" in refused(monkeypatch, capsys, *again)
    assert "cannot resume" in refused(monkeypatch, capsys, *again, "--resume", "--batch-size", 3)
    assert "20 tokens" in refused(monkeypatch, capsys, *again, "--resume", "--tokens", 40)
    assert run(model, tmp_path, "--resume", "--tokens", 20)["tokens"] == 20
    assert run(model, tmp_path, "--overwrite", "--tokens", 5)["tokens"] == 5


def test_a_budget_is_shared_among_the_domains(model: Path, tmp_path: Path) -> None:
    for domain, length in (("a", 30), ("b", 3), ("c", 30)):
        (tmp_path / "texts" / domain).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "texts" / domain / f"{number}.txt").write_text("x " * length + str(number))
    found = run(model, tmp_path / "t", "--tokens", 120, "--sequence-length", 7, data=tmp_path / "texts")
    domains = found["domains"]
    assert domains["a"] == domains["c"] == 40
    assert domains["b"] < 40  # all there is
    (tmp_path / "one.txt").write_text("one domain can be continued with more tokens " * 9)
    for tokens in (10, 50):
        found = run(model, tmp_path / "grows", "--tokens", tokens, "--resume", data=tmp_path / "one.txt")
        assert found["tokens"] == tokens


def test_an_interrupted_run_resumes_where_it_stopped(model: Path, tmp_path: Path) -> None:
    (tmp_path / "long").mkdir()
    for number in range(12):
        (tmp_path / "long" / f"{number}.txt").write_text(f"{number} " + "experts and routers " * 60)
    whole = run(model, tmp_path / "whole", "--sequence-length", 16, data=tmp_path / "long")
    command = ["trace", model, "--data", tmp_path / "long", "--out", tmp_path / "cut", "--sequence-length", 16]
    child = subprocess.Popen(
        [sys.executable, "-m", "collegium", *map(str, command)],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not (tmp_path / "cut" / "meta.json").exists() and child.poll() is None:
        time.sleep(0.02)
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=120)
    if child.returncode == 130:  # a fast machine may have been done before the signal
        assert "--resume continues it" in error
        assert not Trace.open(tmp_path / "cut").meta.complete
    assert (
        run(model, tmp_path / "cut", "--sequence-length", 16, "--resume", data=tmp_path / "long")["tokens"]
        == whole["tokens"]
    )
    frames = [Trace.open(tmp_path / name).scan().collect() for name in ("whole", "cut")]
    assert frames[0].equals(frames[1])


def test_bad_input_is_one_line(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def trace(folder: Path, *arguments: object, data: object = None) -> str:
        source = corpus_folder() if data is None else data
        return refused(monkeypatch, capsys, "trace", folder, "--data", source, "--out", tmp_path / "t", *arguments)

    assert "has no MoE block" in trace(model_folder(tmp_path, "llama"))
    assert "no tokenizer" in trace(model_folder(tmp_path, "olmoe", tokenizer=False))
    assert "no model folder" in trace(tmp_path / "nowhere")
    assert "dtype 'int3' is none of float32" in trace(model, "--dtype", "int3")
    assert "device 'abacus' is not there" in trace(model, "--device", "abacus")
    assert "gate_inputs is a share" in trace(model, "--gate-inputs", "2")
    assert "no corpus at" in trace(model, data=tmp_path / "missing")
    assert "is not a text file" in trace(model, data=model / "model.safetensors")
    assert "they do not belong together" in trace(model_folder(tmp_path, "mixtral", vocab_size=100))
    assert not (tmp_path / "t").exists()


def test_damaged_weights_are_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    def trace(folder: Path) -> str:
        return refused(monkeypatch, capsys, "trace", folder, "--data", corpus_folder(), "--out", tmp_path / "t")

    sharded = model_folder(tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    tiny_model("qwen3_moe", vocab_size=260).save_pretrained(sharded, max_shard_size="40KB")
    gone = sorted(sharded.glob("model-*"))[0]
    gone.unlink()
    assert gone.name in trace(sharded)

    folder = model_folder(tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-8])
    assert "is truncated" in trace(folder)
    (folder / "model.safetensors").write_bytes(content)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    assert "'model.layers.0.mlp.gate.weight'" in trace(folder)


REMOTE = """
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

class OwnConfig(Qwen3MoeConfig):
    model_type = "own_moe"

class OwnForCausalLM(Qwen3MoeForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_runs_only_when_it_is_trusted(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = model_folder(tmp_path, fused=True)
    (folder / "own.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own_moe",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    command = ("trace", folder, "--data", corpus_folder(), "--out", tmp_path / "t", "--tokens", 9)
    assert "execute code that came with the checkpoint" in refused(monkeypatch, capsys, *command)
    assert run(folder, tmp_path / "t", "--tokens", 9, "--trust-remote-code")["tokens"] == 9
