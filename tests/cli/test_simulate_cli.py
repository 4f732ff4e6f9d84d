"""``collegium simulate``: a table of policies, a sweep, and one line for what cannot be simulated."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_inspect import refused
from typer.testing import CliRunner

from collegium.cli.main import app
from collegium.offload.cost import CostModel
from collegium.offload.events import EventLog
from measure_traces import make_trace

N, E, K = 80, 8, 2
DEVICE = ("--device", "gpu:seconds=0.0004,transfer=12")


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


def test_a_batch_regrouped_beside_the_same_as_it_comes(traced: tuple[Path, Path]) -> None:
    asked = ("--experts", 12, "--policy", "lru", "--policy", "lfu", "--batch", 2)
    found = json.loads(run(traced, *asked, "--schedule", "regroup:seed=1", "--json"))
    names = [(one["policy"], one["schedule"]) for one in found["simulations"]]
    assert names == [(policy, way) for policy in ("lru", "lfu") for way in ("as they come", "regrouped")]
    assert (found["batch"], found["passes"], found["tokens"]) == (2, "batches", N)
    plain, dealt = found["simulations"][:2]
    saved = found["saved"][0]
    assert saved["policy"] == "lru"
    assert saved["bytes"] == pytest.approx(1 - dealt["bytes_per_token"] / plain["bytes_per_token"])
    assert saved["speedup"] == pytest.approx(dealt["tokens_per_second"] / plain["tokens_per_second"])
    assert saved["distinct_experts"] == [plain["distinct_experts"], dealt["distinct_experts"]]
    assert dealt["distinct_experts"] < plain["distinct_experts"]
    text = run(traced, *asked, "--schedule", "regroup", "--predictor", "token_id", "--fit", traced[0])
    assert "what regrouping saves" in text
    assert "prefetched" in text
    assert "a pass is a token of each sequence of a batch" in text


def test_a_batch_needs_no_schedule(traced: tuple[Path, Path]) -> None:
    one, two = (
        json.loads(run(traced, "--experts", 12, "--policy", "lru", "--batch", size, "--json"))["simulations"][0]
        for size in (1, 4)
    )
    assert two["hit"] + two["miss"] == pytest.approx(1)
    assert two["demand_bytes_per_token"] < one["demand_bytes_per_token"]
    assert one["schedule"] == ""


def test_two_processors_beside_each_alone(traced: tuple[Path, Path], tmp_path: Path) -> None:
    asked = ("--experts", 8, "--policy", "lru", "--schedule", "hybrimoe", "--device", "gpu:seconds=0.00002,transfer=20")
    found = json.loads(run(traced, *asked, "--json"))
    assert found["device"].startswith("gpu:")
    both, gpu, cpu = found["simulations"]
    assert [one["schedule"] for one in (both, gpu, cpu)] == ["cpu+gpu", "gpu", "cpu"]
    assert 0 < both["slow_share"] < 1
    assert (gpu["slow_share"], cpu["slow_share"]) == (0, 1)
    # 1 MB streams in 0.1 ms from memory that gives 10 GB/s
    assert cpu["expert_ms_per_token"] == pytest.approx(0.1 * K * 2)
    assert both["expert_ms_per_token"] < cpu["expert_ms_per_token"]
    assert sum(layer["seconds"] for layer in both["layers"]) == pytest.approx(both["expert_ms_per_token"] * N / 1000)
    text = run(traced, *asked, "--out", tmp_path)
    for word in ("cpu+gpu ms", "on cpu", "gpu stall", "Its times are those you gave"):
        assert word in text
    plans = pq.read_table(tmp_path / "schedule-0-lru.parquet")
    assert plans.num_rows == N * 2
    with (tmp_path / "simulations.csv").open() as file:
        assert [row["schedule"] for row in csv.DictReader(file)] == ["cpu+gpu", "gpu", "cpu"]


def test_two_processors_by_all_of_their_times_and_by_impact(traced: tuple[Path, Path]) -> None:
    """A batch on two processors, and what is read ahead over their link in the order of what it saves."""
    times = "hybrimoe:fast=0.0005,slow=0.001,slow_start=0.0008,transfer=0.0004"
    ahead = ("--predictor", "token_id", "--fit", traced[0], "--prefetch", "order=impact,depth=2")
    asked = ("--experts", 12, "--policy", "hybrimoe", "--batch", 2, "--schedule", times, *ahead, "--json")
    both = json.loads(run(traced, *asked))["simulations"][0]
    assert both["schedule"] == "cpu+fast"
    assert both["prefetched"] + both["late"] > 0


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
        (["--ratio", "2", "--schedule", "regroup"], "--batch"),
        (["--ratio", "2", "--schedule", "regroup", "--batch", "1"], "nothing to regroup"),
        (["--ratio", "2", "--schedule", "regroup:pairs=2", "--batch", "2"], "no setting 'pairs'"),
        (["--ratio", "2", "--batch", "2", "--passes", "recorded"], "batches already"),
        (["--ratio", "2", "--schedule", "fastest"], "no scheduler is named 'fastest'"),
        (["--ratio", "2", "--schedule", "popularity"], "--schedule is regroup or hybrimoe"),
        (["--sweep", "--schedule", "hybrimoe"], "leave out one of --sweep and --schedule"),
        (["--ratio", "2", "--schedule", "hybrimoe"], "--device gpu:seconds"),
        (["--ratio", "2", "--schedule", "hybrimoe:fast=1", "--device", "gpu:seconds=1,transfer=1"], "not both"),
        (["--ratio", "2", "--schedule", "hybrimoe:fast=1"], "slow"),
        (["--ratio", "2", "--device", "gpu:seconds=1,transfer=1"], "--schedule hybrimoe"),
        (["--ratio", "2", "--schedule", "hybrimoe", "--device", "gpu:transfer=12"], "how fast does it compute"),
        (["--ratio", "2", "--schedule", "hybrimoe", "--device", "gpu:seconds=0,transfer=-1"], "transfer must be"),
        (["--ratio", "2", "--schedule", "hybrimoe", *DEVICE, "--prefilled"], "empty memory"),
        (
            ["--ratio", "2", "--predictor", "frequency", "--fit", "TRACE", "--prefetch", "order=impact"],
            "two processors",
        ),
    ],
)
def test_what_cannot_be_simulated_is_one_line(
    traced: tuple[Path, Path],
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(traced[0]) if one == "TRACE" else one for one in arguments]
    cost = [] if "--cost" in arguments else ["--cost", str(traced[1])]
    told = refused(monkeypatch, capsys, "simulate", traced[0], "--expert-bytes", 1000000, *cost, *arguments)
    assert message in told


def test_an_expert_has_a_size(
    traced: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--expert-bytes" in refused(monkeypatch, capsys, "simulate", traced[0], "--ratio", 2)
