"""The benchmark of measuring: its made-up traces have the structure that metrics look for, its rows hold the goals."""

from __future__ import annotations

from pathlib import Path

import pytest

from collegium.benchmarks import measure
from collegium.measure import cache_curves, domain_information, load, local_routing_consistency


def test_made_up_traces_have_the_structure_that_metrics_look_for(tmp_path: Path) -> None:
    trace = measure.synthesise(tmp_path / "trace", 8 * 512 * 48 * 8)
    assert len(trace) == 8 * 512
    assert len(trace.layers) * 8 * len(trace) == 8 * 512 * 48 * 8
    assert 0.3 < load(trace)[0].max_violation.value < 10
    *_, whole = local_routing_consistency(trace, segments=(4, 64))
    assert whole.srp[0].low > whole.shuffled[0] + 0.1
    curve = cache_curves(trace)[0]
    assert curve.lru[4] > curve.lru_shuffled[4] + 0.05
    assert float(domain_information(trace)[0].bits) > 0


def test_rows_carry_the_goals_of_the_largest_size_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"read": 1.0, "metrics": {"load": 2.0, "cache": 60.0}, "bytes": 3e9}
    monkeypatch.setattr(measure, "SIZES", (10, 20))
    monkeypatch.setattr(measure, "synthesise", lambda folder, decisions: type("trace", (), {"folder": folder}))
    monkeypatch.setattr(measure, "_in_process", lambda folder: found)
    rows = list(measure.run(False, lambda line: None))
    assert [row.name for row in rows] == [
        "2 metrics, 10 decisions",
        "2 metrics, 20 decisions",
        "load",
        "cache",
        "peak memory",
    ]
    assert [row.met for row in rows] == [None, False, None, None, False]
    assert rows[1].ratio == pytest.approx(1 / 62)
    assert (rows[4].ratio, rows[4].unit) == (None, "bytes")
    quick = list(measure.run(True, lambda line: None))
    assert [row.met for row in quick] == [None] * 4


def test_every_metric_without_further_needs_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [metric for metric in measure.metrics() if metric.name in ("load", "confidence", "domains")]
    monkeypatch.setattr(
        measure, "metrics", lambda: [type(m)(m.name, m.question, m.needs, lambda trace: None) for m in ours]
    )
    assert set(measure.measure_all(None)) == {m.name for m in ours if m.needs <= {"domains"}} >= {"load"}
