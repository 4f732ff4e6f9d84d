"""``collegium run`` and ``collegium serve``: the model's own text in little memory, and clear words for wrong input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from folders import model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from collegium.assets import SHIPPED
from collegium.cli._writing import Writer
from collegium.cli.main import app
from collegium.errors import CollegiumError
from collegium.offload.cost import CostModel
from collegium.offload.events import EventLog
from collegium.offload.model import load_offloaded
from collegium.offload.store import pack

PROMPT = "def main(arguments):"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "store"
    pack(SHIPPED["demo"], folder, bits=(16, 8))
    return folder


def run(*arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, ["run", *map(str, arguments)], input=stdin)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def transformers_text(tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["demo"])
    model = AutoModelForCausalLM.from_pretrained(SHIPPED["demo"], experts_implementation="eager")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(PROMPT).input_ids]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def test_text_is_that_of_transformers_in_bfloat16(store: Path) -> None:
    expected = transformers_text(48)
    for model in (store, "demo"):
        found = json.loads(
            run(
                model,
                "--prompt",
                PROMPT,
                "--greedy",
                "--max-new-tokens",
                48,
                "--experts",
                24,
                "--arithmetic",
                "exact",
                "--json",
            ).stdout
        )
        assert found["text"] == expected
        assert found["budget"]["slots"] == {"16": 24}
        assert 0 < found["hit_rate"] < 1
    fast = run(store, "--prompt", PROMPT, "--greedy", "--max-new-tokens", 48, "--experts", 24)
    assert fast.stdout.rstrip("\n") == expected.rstrip("\n")
    assert "tokens/s" in fast.stderr


def test_every_option_of_the_engine_is_taken(store: Path, tmp_path: Path) -> None:
    options = ["--policy", "lfu", "--predictor", "gate_reuse:depth=2", "--prefetch", "width=3,depth=2", "--experts", 30]
    options += [
        "--cost",
        tmp_path / "cost.json",
        "--log",
        tmp_path / "events.parquet",
        "--context",
        128,
        "--max-new-tokens",
        8,
        "--seed",
        1,
        "--json",
    ]
    found = json.loads(run(store, "--prompt", PROMPT, *options).stdout)
    again = json.loads(run(store, "--prompt", PROMPT, "--max-new-tokens", 8, "--seed", 1, "--json").stdout)
    assert found["text"] == again["text"]
    cost = CostModel.load(tmp_path / "cost.json")
    assert cost.layer_seconds > 0
    assert cost.expert[16][0][0] == 1
    log = EventLog.load(tmp_path / "events.parquet")
    assert len(log) == pq.read_metadata(tmp_path / "events.parquet").num_rows > 0
    assert {1, 2} & set(log["found"].tolist())  # something was prefetched


def test_lower_precision_writes_text(store: Path) -> None:
    found = json.loads(run(store, "--prompt", PROMPT, "--precision", "fixed:bits=8", "--json", "--greedy").stdout)
    assert found["budget"]["slots"].keys() == {"8"}
    assert found["tokens"] == 128


def test_a_panel_shows_where_experts_were(store: Path) -> None:
    found = run(store, "--prompt", PROMPT, "--watch", "--greedy", "--max-new-tokens", 6, "--experts", 20)
    assert "where its experts were" in found.stdout


def test_chat_needs_a_template_and_answers_with_one(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["run", "demo", "--chat"])
    assert isinstance(refused.exception, CollegiumError)
    assert "no chat template" in str(refused.exception)
    folder = model_folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    found = run(
        folder, "--chat", "--system", "short", "--max-new-tokens", 4, "--greedy", stdin="a router\nand more\n\n"
    )
    assert len(re.findall(r"tokens read in", found.stderr)) == 2


def test_a_chat_that_goes_on_says_what_a_fresh_one_would(store: Path) -> None:
    """What both turns have in common is not computed again, and nothing changes by that."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["demo"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    settings = {"max_new_tokens": 6, "do_sample": False}
    messages = [{"role": "user", "content": "import os"}]
    with load_offloaded(store, kind="exact") as found:
        writer = Writer(found, tokenizer, settings, quiet=True)
        messages.append({"role": "assistant", "content": writer.answer(messages)})
        messages.append({"role": "user", "content": "and more of it"})
        before = found.counters()["tokens"]
        second = writer.answer(messages)
        fed = found.counters()["tokens"] - before
        again = Writer(found, tokenizer, settings, quiet=True)
        assert second == again.answer(messages)
        assert fed < again.last["prompt_tokens"] + again.last["tokens"] - 1
        assert again.write("import os") == again.write("import os")  # a prompt that the cache holds whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "--prompt"),
        (["demo", "--prompt", "a", "--chat"], "not both"),
        (["demo", "--prompt", "a", "--memory", "lots"], "is no size"),
        (["demo", "--prompt", "a", "--memory", "20MiB"], "is too little"),
        (["demo", "--prompt", "a", "--policy", "best"], "no cache is named 'best'"),
        (["demo", "--prompt", "a", "--policy", "lru:size=3"], "setting 'size'"),
        (["demo", "--prompt", "a", "--predictor", "path"], "record one"),
        (["demo", "--prompt", "a", "--precision", "fixed:bits=4"], "no copy of 4 bits"),
        (["demo", "--prompt", "a", "--context", "100000"], "context of 100000"),
        (["demo", "--prompt", "a " * 500, "--context", "64"], "shorten it"),
        (["nowhere", "--prompt", "a"], "no model folder"),
        (["demo-dense", "--prompt", "a"], "no MoE"),
        (["demo", "--prompt", "a", "--fit", "x"], "--predictor"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["run", *arguments])
    assert isinstance(result.exception, CollegiumError), result.exception
    assert message in str(result.exception)


def test_serve_answers_and_ends_with_ctrl_c(store: Path) -> None:
    command = [sys.executable, "-m", "collegium", "serve", str(store), "--port", "0", "--experts", "20"]
    environment = {**os.environ, "COLLEGIUM_API_KEY": "secret"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stderr is not None
            lines = iter(server.stderr.readline, "")
            url = next(found[1] for line in lines if (found := re.search(r"serving at (http://\S+)", line)))
            body = json.dumps({"model": "store", "prompt": PROMPT, "max_tokens": 4, "trace": True}).encode()
            headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
            request = urllib.request.Request(f"{url}/v1/completions", body, headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                found = json.load(answer)
            assert found["usage"]["completion_tokens"] == 4
            layers = found["collegium"]["trace"][0]["layers"]
            assert [layer["layer"] for layer in layers] == [0, 1, 2, 3]
            assert {place for layer in layers for place in layer["source"]} == {
                "disk"
            }  # the first token needs them all
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) == 0
        finally:
            server.kill()


def test_ctrl_c_in_the_middle_of_a_text_ends_it_there(store: Path) -> None:
    command = [sys.executable, "-u", "-m", "collegium", "run", str(store), "--prompt", PROMPT, "--greedy"]
    command += ["--max-new-tokens", "4000", "--repetition-penalty", "1.3", "--context", "256", "--experts", "8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1)  # the first words are there
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
            assert re.search(r"\d+ written", said)
        finally:
            process.kill()


def test_a_store_survives_a_kill_under_load(store: Path) -> None:
    command = [sys.executable, "-u", "-m", "collegium", "run", str(store), "--prompt", PROMPT, "--experts", "8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGKILL)
    run(store, "--prompt", PROMPT, "--max-new-tokens", 2, "--json")


def test_a_damaged_expert_ends_its_request_and_the_server_lives(store: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(store, tmp_path / "damaged")
    command = [sys.executable, "-m", "collegium", "serve", str(damaged), "--port", "0", "--experts", "12"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            lines = iter(server.stderr.readline, "")
            url = next(found[1] for line in lines if (found := re.search(r"serving at (http://\S+)", line)))

            def asked(prompt: str) -> tuple[int, str]:
                body = json.dumps({"model": "damaged", "prompt": prompt, "max_tokens": 6, "temperature": 0}).encode()
                request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
                try:
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        return answer.status, answer.read().decode()
                except urllib.error.HTTPError as error:
                    return error.code, error.read().decode()

            status, before = asked(PROMPT)
            assert status == 200
            file = damaged / "experts-00001-16.bin"
            whole = file.read_bytes()
            file.write_bytes(bytes(byte ^ 0x10 for byte in whole))  # while it is open and in use
            status, said = asked("another text altogether, so that other experts are read")
            assert status == 500
            assert "checksum" in said
            file.write_bytes(whole[: len(whole) // 16])
            assert asked("a third text, of numbers 1 2 3 4 5 6 7")[0] == 500
            file.write_bytes(whole)
            status, after = asked(PROMPT)
            assert status == 200
            assert json.loads(after)["choices"] == json.loads(before)["choices"]
        finally:
            server.kill()
