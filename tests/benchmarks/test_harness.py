"""The form of benchmarks: rows, turns, limits, and the verb."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from collegium.benchmarks import harness
from collegium.benchmarks.experts import SHAPES, TOKENS, _call, _experts
from collegium.cli.main import app
from collegium.errors import ConfigError
from collegium.sites import register

FAKE = [
    harness.Row("fast", ours=0.5, peer=1.0, peer_name="slow", goal=2.0, limit="memory 40 GB/s", share=0.8),
    harness.Row("late", ours=2.0, peer=1.0, peer_name="other", goal=0.98),
    harness.Row("free", ours=1.0, peer=1.5, peer_name="other"),
]


def test_ratio_above_one_is_better_for_us() -> None:
    assert [row.ratio for row in FAKE] == [2.0, 0.5, 1.5]
    assert [row.met for row in FAKE] == [True, False, None]


def test_a_peer_that_is_the_truth_is_to_be_met_from_both_sides() -> None:
    met = [harness.Row("x", ours, 2.0, within=0.25).met for ours in (1.49, 1.5, 2.5, 2.51, float("nan"))]
    assert met == [False, True, True, False, False]
    assert harness.Row("x", 1.0, None, within=0.25).met is False
    record = harness.Row("x", float("nan"), 2.0, within=0.25).record()
    assert (record["ours"], record["ratio"], record["within"]) == (None, None, 0.25)


def test_calls_take_turns_and_medians_ignore_an_outlier() -> None:
    order: list[str] = []
    pauses = iter([0.0, 0.0, 0.2, 0.0, 0.0, 0.0])

    def slow() -> None:
        order.append("a")
        time.sleep(next(pauses))

    found = harness.medians({"a": slow, "b": lambda: order.append("b")}, repeats=5)
    assert order == ["a", "b"] * 6
    assert found["a"] < 0.1


def test_unknown_benchmarks_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="experts, measure, routing, run, shrink, trace, train"):
        harness.find("nonsense")
    result = CliRunner().invoke(app, ["bench"])
    names = [line.partition(":")[0] for line in result.stdout.splitlines()]
    assert names == ["experts", "measure", "routing", "run", "shrink", "trace", "train"]


def test_verb_prints_rows_and_fails_where_a_goal_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find", lambda name: SimpleNamespace(run=lambda quick, say: iter(FAKE)))
    result = CliRunner().invoke(app, ["bench", "experts", "--json"])
    assert result.exit_code == 1
    rows = json.loads(result.stdout)["rows"]
    assert [row["ratio"] for row in rows] == [2.0, 0.5, 1.5]
    assert set(rows[0]) == {
        "name",
        "ours",
        "peer",
        "peer_name",
        "ratio",
        "goal",
        "met",
        "limit",
        "share",
        "most",
        "unit",
        "within",
    }
    monkeypatch.setattr(harness, "find", lambda name: SimpleNamespace(run=lambda quick, say: iter(FAKE[::2])))
    result = CliRunner().invoke(app, ["bench", "experts"])
    assert result.exit_code == 0
    assert "80%" in result.stdout


def test_limits_are_plausible() -> None:
    assert 1e9 < harness.memory_bandwidth(1 << 26) < 1e13
    assert 1e8 < harness.gemm_rate(torch.float32, 256) < 1e14


def test_the_experts_benchmark_compares_equal_work() -> None:
    assert set(TOKENS) == {1, 8, 64, 512, 4096}
    assert SHAPES["OLMoE-1B-7B"] == (2048, 1024, 64, 8)
    register()
    experts = _experts(32, 16, 8, torch.float32)
    x, index, weight = torch.randn(5, 32), torch.rand(5, 8).topk(2).indices, torch.rand(5, 2)
    results = {}
    for way in ("collegium", "eager", "grouped_mm", "batched_mm"):
        results[way] = _call(experts, way, x, index, weight, backward=False)()
        _call(experts, way, x, index, weight, backward=True)()
        assert x.grad is not None
        assert experts.down_proj.grad is None, "gradients are dropped between turns"
    for way in ("eager", "grouped_mm", "batched_mm"):
        torch.testing.assert_close(results["collegium"], results[way], rtol=1e-4, atol=1e-5)
