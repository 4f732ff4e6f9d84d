"""``collegium watch``: a real training run and traces, followed while they grow and once they are there."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from test_inspect import refused
from typer.testing import CliRunner

from collegium.cli._watch import WINDOW, Frame, draw, open_source, spark
from collegium.cli.main import app
from collegium.errors import DataError
from collegium.trace import record_generate
from collegium.train import read_metrics
from measure_traces import make_trace
from tiny import tiny_model

E, LAYERS = 4, 2


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe of the repository, made tinier."""
    folder = tmp_path_factory.mktemp("plan")
    draw = random.Random(0)
    for n in range(24):
        place = folder / "corpus" / ("valid" if n % 8 == 0 else "train") / "count"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{n}.txt").write_text(" ".join(str(draw.randrange(1000)) for _ in range(80)))
    plan = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "tiny.yaml").read_text())
    plan["model"] |= {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "num_attention_heads": 2}
    plan["model"] |= {"num_key_value_heads": 1, "num_hidden_layers": LAYERS}
    plan["moe"] |= {"num_experts": E, "moe_intermediate_size": 8}
    plan["data"] = {"corpus": str(folder / "corpus"), "vocab_size": 280, "sequence_length": 32}
    plan["data"] |= {"cache": str(folder / "cache")}
    plan["run"] |= {"steps": 6, "batch_size": 4, "log_every": 2, "eval_every": 3, "checkpoint_every": 0}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return folder / "plan.yaml"


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    result = CliRunner().invoke(app, ["train", str(recipe), "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    return out


def watch(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["watch", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return result.stdout


def shown(frame: Frame, width: int = 80, height: int | None = None) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(draw(frame, "run", width=width, height=height))
    return console.export_text()


def test_metrics_hold_the_load_of_every_expert(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 4, 6]
    for line in steps:
        assert np.shape(line["loads"]) == (LAYERS, E)
        np.testing.assert_allclose(np.sum(line["loads"], axis=1), 1, atol=E * 5e-5)
        loads = np.asarray(line["loads"])
        assert math.isclose((loads.max(1) * E - 1).mean(), line["max_violation"], abs_tol=1e-3)
        used = np.where(loads > 0, loads, 1)
        assert math.isclose(-(used * np.log2(used)).sum(1).mean(), line["entropy"], abs_tol=1e-2)
    assert all("loads" not in line for line in lines if line["event"] == "eval")
    assert {"loads", "entropy"} <= set(read_metrics(trained / "metrics.jsonl").columns)


def test_a_finished_run_in_one_frame(trained: Path) -> None:
    text = watch(trained, "--once")
    for word in ("tiny", "complete", "step 6 of 6", "768 tokens", "loss", "tokens/s", "MaxVio", "entropy", "dead"):
        assert word in text
    found = json.loads(watch(trained, "--json"))
    assert found["state"] == "complete"
    assert len(found["history"]["loss"]) == 4
    assert np.shape(found["loads"]) == (LAYERS, E)
    assert watch(trained).count("complete") == 1  # the live view ends by itself


def test_a_run_is_followed_line_by_line(trained: Path, tmp_path: Path) -> None:
    lines = (trained / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    source = open_source(tmp_path)
    assert source.poll().progress == "no step yet"
    with open(tmp_path / "metrics.jsonl", "ab", buffering=0) as file:
        file.write(lines[0] + lines[1][:20])  # the second line is half written
        assert source.poll().history["loss"] == [json.loads(lines[0])["loss"]]
        file.write(lines[1][20:])
        assert len(source.poll().history["loss"]) == 2
        assert source.poll().state == "running"
        file.truncate(len(lines[0]))  # a resumed run goes back to its checkpoint
    assert len(source.poll().history["loss"]) == 1
    (tmp_path / "summary.json").write_text("{}")
    assert source.poll().state == "complete"
    (tmp_path / "metrics.jsonl").write_bytes(b"no json\n" + lines[0] * 2)
    with pytest.raises(DataError, match="no json"):
        open_source(tmp_path).poll()


def test_a_real_run_in_the_background_until_it_ends(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    program = [sys.executable, "-m", "collegium"]
    command = [*program, "train", str(recipe), "--out", str(out), "run.steps=30", "run.log_every=1"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as training:
        view = subprocess.run(
            [*program, "watch", str(out), "--wait", "--interval", "0.2"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert training.wait(60) == 0
    assert "waiting for" in view.stderr
    assert "complete: step 30 of 30" in view.stdout


def test_ctrl_c_leaves_cleanly(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes((trained / "metrics.jsonl").read_bytes())
    for arguments in ([str(tmp_path), "--interval", "30"], [str(tmp_path / "nothing"), "--wait"]):
        command = [sys.executable, "-u", "-m", "collegium", "watch", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as view:
            try:
                time.sleep(3)
                view.send_signal(signal.SIGINT)
                output, errors = view.communicate(timeout=20)
            finally:  # or a view that missed the signal would be waited for without end
                view.kill()
        assert view.returncode == 0, errors
        assert "Traceback" not in errors
        assert ("loss" in output) == ("nothing" not in arguments[0])


def test_nothing_to_watch(tmp_path: Path, monkeypatch, capsys) -> None:
    assert "does not exist" in refused(monkeypatch, capsys, "watch", tmp_path / "x")
    assert "neither metrics.jsonl" in refused(monkeypatch, capsys, "watch", tmp_path, "--once")


def test_a_trace_that_grows(tmp_path: Path) -> None:
    experts = np.arange(400).reshape(200, 2) % 6
    whole = make_trace(tmp_path / "whole", {0: experts, 3: experts % 3 * 2}, {0: 8, 3: 6}, part_rows=50)
    make_trace(tmp_path / "t", {0: experts[:50], 3: experts[:50] % 3 * 2}, {0: 8, 3: 6}, part_rows=50, complete=False)
    source = open_source(tmp_path / "t")
    first = source.poll()
    assert first.progress == "50 tokens in 1 parts"
    assert first.state == "running"
    assert "tokens/s" not in first.now
    assert first.layers == [0, 3]
    assert first.now["dead experts"] == 2 + 3
    began = time.time()
    for n, file in enumerate(whole.files[1:], 1):
        (tmp_path / "t" / file.name).write_bytes(file.read_bytes())
        os.utime(tmp_path / "t" / file.name, (began, began + 2 * n))
    second = source.poll()
    assert second.progress == "200 tokens in 4 parts"
    assert second.history["tokens/s"][1:] == [pytest.approx(25.0)] * 2
    np.testing.assert_allclose(second.loads[0], [*[1 / 6] * 6, 0, 0], atol=0.01)
    assert len(second.loads[1]) == 6
    finished = json.loads(watch(tmp_path / "whole", "--json"))
    assert finished["state"] == "complete"
    assert finished["progress"] == "200 tokens in 4 parts"
    assert "×" in watch(tmp_path / "whole", "--once")


def test_small_parts_are_shown_together(tmp_path: Path) -> None:
    """One token a part has one expert; the numbers are of the latest thousand."""
    experts = (np.arange(3000) % 4)[:, None]
    phases = ["prefill"] * 10 + ["decode"] * 2990
    whole = make_trace(tmp_path / "whole", {0: experts}, 8, phases=phases, part_rows=1)
    make_trace(tmp_path / "t", {0: experts[:1]}, 8, part_rows=1, complete=False)
    source = open_source(tmp_path / "t")
    assert source.poll().now["dead experts"] == 7
    for file in whole.files[1:5]:
        (tmp_path / "t" / file.name).write_bytes(file.read_bytes())
    frame = source.poll()
    assert frame.history["dead experts"] == [7, 6, 5, 4, 4]
    np.testing.assert_allclose(frame.loads[0], [0.4, 0.2, 0.2, 0.2, 0, 0, 0, 0])
    last = open_source(tmp_path / "whole")
    assert "3,000 tokens in 3000 parts (10 prefill, 2,990 decode)" in last.poll().progress
    assert sum(tokens for tokens, _ in last.window) == WINDOW


def test_a_trace_is_watched_while_a_model_generates(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    frames: list[Frame] = []

    def look(tokens: int) -> None:
        if (tmp_path / "t" / "meta.json").is_file():
            frames.append(copy.deepcopy(sources.setdefault("t", open_source(tmp_path / "t")).poll()))
            time.sleep(0.02)  # for the writer's thread

    sources: dict[str, Any] = {}
    prompt = torch.randint(3, 60, (2, 9))
    record_generate(
        model, [{"input_ids": prompt}], tmp_path / "t", max_new_tokens=25, part_seconds=0.0, progress=look,
        eos_token_id=None,
    )  # fmt: skip
    running = [frame for frame in frames if frame.loads]
    assert len(running) > 5
    assert all(frame.state == "running" for frame in running)
    assert "18 prefill" in running[-1].progress
    assert "decode)" in running[-1].progress
    assert [len(frame.history["MaxVio"]) for frame in running] == sorted(len(f.history["MaxVio"]) for f in running)
    assert {"tokens/s", "MaxVio", "entropy, bits", "dead experts"} <= running[-1].now.keys()
    assert running[-1].loads != running[0].loads
    last = sources["t"].poll()
    assert last.state == "complete"
    assert f"{2 * 9 + 2 * 24} tokens" in last.progress


def test_drawing_fits_the_terminal() -> None:
    draw_loads = np.random.default_rng(0).dirichlet(np.ones(256), size=40)
    loads = [[1.0, *[0.0] * 255], *draw_loads.tolist()]
    frame = Frame("training", "running", "step 1", list(range(41)), loads, {"loss": 1.0}, {"loss": [1.0]})
    for width in (60, 100, 300):
        text = shown(frame, width)
        assert max(map(len, text.splitlines())) <= width
        assert all(f"\n{layer:>5}  " in text for layer in range(41))
    short = shown(frame, 100, height=20)
    assert len(short.splitlines()) <= 20
    assert "more layers" in short
    assert "256.00" in short  # the layer with the most imbalance stays
    even = Frame("training", "running", "", [0], [[0.25] * 4], {}, {})
    assert "▒" * 4 in shown(even)


def test_spark_lines() -> None:
    assert spark([0, 1, 2]) == "▁▅█"
    assert spark([3.0, 3.0]) == "▄▄"
    assert spark([1.0, math.nan, 2.0]) == "▁ █"
    assert spark([math.nan]) == ""
