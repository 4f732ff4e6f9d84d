"""``collegium generate``: the text the model gives, streamed or whole; bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folders import model_folder
from test_inspect import refused
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from collegium.cli.main import app
from collegium.trace import Trace
from collegium.trace.schema import PHASES

PROMPT = "a router decides"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"))


def generate(*arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)
    assert result.exit_code == 0, result.output
    return result


def expected(model: Path, **settings: object) -> str:
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(PROMPT).input_ids]])
    output = network.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=1, **settings)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_greedy_text_is_transformers_own(model: Path) -> None:
    asked = expected(model, max_new_tokens=12, do_sample=False)
    found = json.loads(generate(model, PROMPT, "--greedy", "--max-new-tokens", 12, "--json").stdout)
    assert found["text"] == asked
    assert found["tokens"] <= 12
    assert found["tokens_per_second"] > 0
    streamed = generate(model, PROMPT, "--greedy", "--max-new-tokens", 12)
    assert streamed.stdout.rstrip("\n") == asked.rstrip("\n")
    assert "tokens/s" in streamed.stderr
    assert generate(model, PROMPT, "--greedy", "--max-new-tokens", 12, "--no-stream").stdout == asked + "\n"


def test_sampling_options_reach_the_model(model: Path) -> None:
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.3}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    torch.manual_seed(3)
    asked = expected(model, max_new_tokens=10, do_sample=True, **options)
    run = ["--max-new-tokens", 10, "--seed", 3, "--json", *flags]
    assert json.loads(generate(model, PROMPT, *run).stdout)["text"] == asked
    texts = {json.loads(generate(model, PROMPT, "--seed", seed, "--json").stdout)["text"] for seed in range(4)}
    assert len(texts) > 1


def test_prompt_from_standard_input(model: Path) -> None:
    piped = generate(model, "-", "--greedy", "--no-stream", "--max-new-tokens", 5, stdin=PROMPT)
    assert piped.stdout == generate(model, PROMPT, "--greedy", "--no-stream", "--max-new-tokens", 5).stdout


def test_a_trace_of_what_was_generated(model: Path, tmp_path: Path) -> None:
    plain = json.loads(generate(model, PROMPT, "--seed", 3, "--max-new-tokens", 12, "--json").stdout)
    run = ["--seed", 3, "--max-new-tokens", 12, "--trace", tmp_path / "t"]
    found = json.loads(generate(model, PROMPT, *run, "--json").stdout)
    assert (found["text"], found["tokens"]) == (plain["text"], plain["tokens"]), "watching changes nothing"
    assert found["trace"] == str(tmp_path / "t")
    trace = Trace.open(tmp_path / "t")
    assert trace.meta.complete
    assert trace.meta.fingerprint
    prompt, fed = found["prompt_tokens"], found["tokens"] - 1  # the last token is never fed back
    assert trace.column("phase").tolist() == [PHASES.index("prefill")] * prompt + [PHASES.index("decode")] * fed
    text = AutoTokenizer.from_pretrained(model).decode(trace.tokens()[prompt:], skip_special_tokens=True)
    assert found["text"].startswith(text.rstrip("\ufffd"))  # the last letter may be half there
    streamed = generate(model, PROMPT, *run, "--overwrite")
    assert streamed.stdout.rstrip("\n") == found["text"].rstrip("\n")


def test_a_long_answer_is_written_meanwhile(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("collegium.cli.generate.PART_SECONDS", 0.0)
    run = ["--greedy", "--max-new-tokens", 20, "--trace", tmp_path / "t", "--json"]
    fed = json.loads(generate(model, PROMPT, *run).stdout)["tokens"] - 1
    assert len(Trace.open(tmp_path / "t").files) == 1 + fed, "the prompt, then each step"


def test_a_dense_model_generates_too(tmp_path: Path) -> None:
    assert generate(model_folder(tmp_path, "llama"), PROMPT, "--greedy", "--max-new-tokens", 3).stdout.strip()


def test_bad_input_is_one_line(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def error(*arguments: object) -> str:
        return refused(monkeypatch, capsys, "generate", *arguments)

    assert "no model folder" in error(tmp_path / "nowhere", PROMPT)
    assert "has no tokenizer; put one there" in error(model_folder(tmp_path, "olmoe", tokenizer=False), PROMPT)
    assert "temperature must be above 0" in error(model, PROMPT, "--temperature", "0")
    assert "top_p must be above 0" in error(model, PROMPT, "--top-p", "1.5")
    assert "repetition_penalty must be above 0" in error(model, PROMPT, "--repetition-penalty", "-1")
    assert "so top_k would do nothing" in error(model, PROMPT, "--greedy", "--top-k", "3")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "meta.json").write_text("{}")
    assert "holds a trace already" in error(model, PROMPT, "--trace", tmp_path / "t")
    assert "no MoE" in error(model_folder(tmp_path, "llama"), PROMPT, "--trace", tmp_path / "u")
    assert "they do not belong together" in error(model_folder(tmp_path, "mixtral", vocab_size=100), PROMPT)
    damaged = model_folder(tmp_path)
    (damaged / "tokenizer.json").write_text("{")
    assert "cannot open the tokenizer" in error(damaged, PROMPT)
