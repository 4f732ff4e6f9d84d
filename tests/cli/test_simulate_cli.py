"""``collegium simulate``: a table of policies, a sweep, and one line for what cannot be simulated."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from test_inspect import refused
from typer.testing import CliRunner

from collegium.cli.main import app
from collegium.offload.cost import CostModel
from collegium.offload.events import EventLog
from measure_traces import make_trace

N, E, K = 80, 8, 2


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trace and a cost model."""
    root = tmp_path_factory.mktemp("simulate")
    draw = np.random.default_rng(0)
    experts = {layer: np.argsort(draw.random((N, E)) * np.arange(1, E + 1), axis=1)[:, :K] for layer in (0, 1)}
    make_trace(root / "trace", experts, E, sequences=np.arange(N) // 20, tokens=draw.integers(0, 9, N))
    cost = CostModel(read_bandwidth=1e9, read_latency=1e-4, memory_bandwidth=1e10, measured="for a test")
    cost.save(root / "cost.json")
    return root / "trace", root / "cost.json"


def run(traced: tuple[Path, Path], *arguments: object) -> str:
    command = ["simulate", traced[0], "--cost", traced[1], "--expert-bytes", 1000000, *arguments]
    result = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_policy_in_a_table(traced: tuple[Path, Path]) -> None:
    text = run(traced, "--ratio", 2)
    for name in ("lru", "lfu", "arc", "opt", "hybrimoe", "hobbit", "edgemoe", "moe_infinity", "fate", "expertflow"):
        assert f"│ {name} " in text
    assert "prompts were unrolled token by token" in text
    assert "times: for a test" in text


def test_memory_experts_and_ratio_say_the_same(traced: tuple[Path, Path]) -> None:
    ways = (("--memory", "8MB"), ("--experts", 8), ("--ratio", 2))
    found = [json.loads(run(traced, *way, "--policy", "lru", "--json")) for way in ways]
    assert found[0] == found[1] == found[2]
    (one,) = found[0]["simulations"]
    assert one["experts"] == 8
    assert one["share"] == 0.5
    assert one["hit"] + one["miss"] == pytest.approx(1)
    assert found[0]["tokens"] == N
    assert found[0]["prompts_unrolled"]
    assert one["distance_to_opt"] > 0


def test_reading_ahead_with_a_predictor(traced: tuple[Path, Path]) -> None:
    ahead = ("--predictor", "token_id", "--fit", traced[0], "--prefetch", 2)
    found = json.loads(run(traced, "--experts", 12, "--policy", "lru", "--policy", "expertflow", *ahead, "--json"))
    assert all(one["prefetched"] + one["late"] > 0 for one in found["simulations"])


def test_a_sweep_is_drawn(traced: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(traced, "--sweep", "--policy", "lru", "--policy", "opt:scope=global", "--out", out, "--tokens", 40)
    with (out / "simulations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["experts"] for row in rows if row["policy"] == "lru"] == ["4", "6", "8", "12", "16"]
    assert all(float(row["distance_to_opt"]) >= 0 for row in rows)
    assert len(json.loads((out / "simulations.json").read_text())) == len(rows) == 10
    for name in ("sweep-hits", "sweep-speed", "sweep-bytes"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{name}.svg").read_text()
        page = (out / f"{name}.html").read_text()
        assert "opt:scope=global" in page
        assert 'src="http' not in page


def test_events_are_written(traced: tuple[Path, Path], tmp_path: Path) -> None:
    run(traced, "--experts", 6, "--policy", "lru", "--out", tmp_path)
    assert len(EventLog.load(tmp_path / "events-0-lru.parquet")) == N * K * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say how much memory there is"),
        (["--ratio", "2", "--experts", "4"], "say how much memory there is"),
        (["--sweep", "--experts", "4"], "leave out --memory"),
        (["--memory", "many"], "is no size"),
        (["--memory", "1MB"], "each of the 2 MoE layers needs at least one"),
        (["--ratio", "2", "--policy", "best"], "no cache is named 'best'"),
        (["--ratio", "2", "--policy", "lru:x=1"], "no setting 'x'"),
        (["--ratio", "2", "--prefetch", "2"], "--predictor"),
        (["--ratio", "2", "--predictor", "token_id"], "--fit"),
        (["--ratio", "2", "--cost", "none.json"], "could not read the cost model"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(
    traced: tuple[Path, Path],
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cost = [] if "--cost" in arguments else ["--cost", str(traced[1])]
    told = refused(monkeypatch, capsys, "simulate", traced[0], "--expert-bytes", 1000000, *cost, *arguments)
    assert message in told


def test_an_expert_has_a_size(
    traced: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--expert-bytes" in refused(monkeypatch, capsys, "simulate", traced[0], "--ratio", 2)
