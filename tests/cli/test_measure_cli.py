"""``collegium measure`` and ``collegium compare``: everything a trace allows, and a reason for what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from folders import corpus_folder, model_folder
from test_inspect import refused
from typer.testing import CliRunner

from collegium.cli._metrics import cell
from collegium.cli.main import app
from collegium.measure.estimate import Estimate
from collegium.measure.metric import metrics
from measure_traces import make_trace

N, E, K = 240, 8, 2


def traced(folder: Path, seed: int = 0, *, logits: bool = True, domains: bool = True) -> Path:
    draw = np.random.default_rng(seed)
    experts = {layer: np.argsort(draw.random((N, E)), axis=1)[:, :K] for layer in (0, 2)}
    make_trace(
        folder,
        experts,
        E,
        sequences=np.arange(N) // 20,
        tokens=np.random.default_rng(1).integers(0, 9, N),
        domains=np.arange(N) // 20 % 2 if domains else None,
        domain_names=("code", "prose") if domains else ("unknown",),
        logits={layer: draw.normal(size=(N, E)) for layer in experts} if logits else None,
    )
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_all_metrics_that_a_trace_allows(tmp_path: Path) -> None:
    found = json.loads(run("measure", traced(tmp_path), "--json"))
    names = {metric.name for metric in metrics()}
    needing = {metric.name for metric in metrics() if metric.needs & {"other", "model", "gate_inputs"}}
    assert set(found["metrics"]) | set(found["not_measured"]) == names
    assert set(found["not_measured"]) == needing
    assert found["tokens"] == N
    load = found["metrics"]["load"]
    assert load["question"]
    assert [one["layer"] for one in load["results"]] == [0, 2]
    assert sum(load["results"][0]["counts"]) == N * K
    assert set(load["results"][0]["max_violation"]) == {"value", "low", "high"}
    assert found["intervals"] == "95 %, bootstrap over 12 documents"
    cache = found["metrics"]["cache"]["results"][0]
    assert np.shape(cache["lru_interval"]) == (len(cache["lru"]), 2)
    confidence = found["metrics"]["confidence"]["results"][0]
    for part in (confidence["margin"]["0.5"], confidence["fragile"], *confidence["changed_by_k"].values()):
        assert part["low"] <= part["value"] <= part["high"]


def test_reasons_say_what_to_do(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = traced(tmp_path, logits=False, domains=False)
    reasons = json.loads(run("measure", folder, "--json"))["not_measured"]
    assert "--logits" in reasons["confidence"]
    assert "two domains" in reasons["domains"]
    assert "collegium compare" in reasons["fluctuation"]
    assert "--model" in reasons["redundancy"]
    text = run("measure", folder)
    assert "confidence needs router logits" in text
    assert "--logits" in refused(monkeypatch, capsys, "measure", folder, "-m", "confidence")
    assert "no metric is named 'beauty'" in refused(monkeypatch, capsys, "measure", folder, "-m", "beauty")
    assert "name a trace" in refused(monkeypatch, capsys, "measure")


def test_tables_have_the_question_and_a_row_a_layer(tmp_path: Path) -> None:
    text = run("measure", traced(tmp_path), "-m", "load", "-m", "drift")
    assert "load: How evenly are the experts used?" in text
    assert "drift:" in text
    assert "cache" not in text
    rows = [line for line in text.splitlines() if line.startswith(("│ 0 ", "│ 2 "))]
    assert len(rows) == 4


def test_a_single_document_has_no_intervals_and_that_is_said(tmp_path: Path) -> None:
    make_trace(tmp_path, {0: np.arange(60).reshape(30, 2) % 8}, 8)
    found = json.loads(run("measure", tmp_path, "-m", "cache", "-m", "drops", "--json"))
    assert found["intervals"].startswith("none: the trace is of one document")
    assert found["metrics"]["cache"]["results"][0]["lru_interval"] is None
    assert found["metrics"]["drops"]["results"][0]["overall"]["low"] is None
    assert "intervals: none" in run("measure", tmp_path, "-m", "cache")
    assert "intervals: 95 %, bootstrap over 12 documents" in run("measure", traced(tmp_path / "t"), "-m", "cache")


def test_a_table_that_is_too_wide_goes_on_below(tmp_path: Path) -> None:
    folder = traced(tmp_path)
    command = ["measure", str(folder), "-m", "confidence"]
    text = CliRunner().invoke(app, command, catch_exceptions=False, env={"COLUMNS": "70"}).stdout
    assert max(map(len, text.splitlines())) <= 70
    assert text.count("confidence, continued") >= 2
    assert text.count("┃ layer ┃") == text.count("confidence, continued") + 1
    rows = json.loads(run(*command, "--json"))["metrics"]["confidence"]["results"]
    for estimate in (rows[0]["fragile"], rows[1]["entropy"]):
        assert cell(Estimate(**estimate)) in text, "on one line"
    assert "continued" not in run(*command[:3], "load")


def test_a_metric_without_rows(tmp_path: Path) -> None:
    make_trace(tmp_path, {0: np.arange(40).reshape(20, 2) % 8}, 8)
    text = run("measure", tmp_path, "-m", "affinity")
    assert "affinity: " in text
    assert "nothing to show" in text


def test_the_list_names_every_metric() -> None:
    text = run("measure", "--list")
    assert all(metric.name in text for metric in metrics())
    assert {one["name"] for one in json.loads(run("measure", "--list", "--json"))} == {m.name for m in metrics()}


def test_an_empty_trace_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    make_trace(tmp_path, {0: np.zeros((1, 1), int)}, 2, complete=True)
    for part in tmp_path.glob("part-*"):
        part.unlink()
    assert "parts" in refused(monkeypatch, capsys, "measure", tmp_path)


def test_with_the_model(tmp_path: Path) -> None:
    model = model_folder(tmp_path)
    options = ["--data", corpus_folder(), "--out", tmp_path / "t", "--gate-inputs", 1.0, "--sequence-length", 16]
    run("trace", model, *options)
    metrics_asked = ["-m", "predictability", "-m", "redundancy"]
    found = json.loads(run("measure", tmp_path / "t", "--model", model, *metrics_asked, "--json"))
    assert "gate input" in found["metrics"]["predictability"]["results"][1]["recall"]
    assert len(found["metrics"]["redundancy"]["results"]) == 2


def test_two_traces_side_by_side(tmp_path: Path) -> None:
    first, second = traced(tmp_path / "a"), traced(tmp_path / "b", seed=3)
    found = json.loads(run("compare", first, second, "--json"))
    between = {metric.name for metric in metrics() if "other" in metric.needs}
    assert set(found["metrics"]) == between
    assert found["not_measured"] == {}
    assert [row["layer"] for row in found["side_by_side"]] == [0, 2, None]
    load = json.loads(run("measure", second, "-m", "load", "--json"))["metrics"]["load"]["results"]
    assert found["side_by_side"][0]["MaxVio"][1]["value"] == pytest.approx(load[0]["max_violation"]["value"])
    assert {"MaxVio", "entropy, bits", "SRP(16)", "domain, bits"} <= set(found["side_by_side"][0])
    text = run("compare", first, second)
    assert "difference" in text
    assert "fluctuation:" in text
    same = json.loads(run("compare", first, first, "--json"))
    changed = same["metrics"]["fluctuation"]["results"][0]["changed"]["value"]
    assert changed == 0


def test_compare_without_domains_says_so(tmp_path: Path) -> None:
    first, second = traced(tmp_path / "a"), traced(tmp_path / "b", domains=False)
    found = json.loads(run("compare", first, second, "--json"))
    assert "two domains" in found["not_measured"]["domains"]
    assert "domain, bits" not in found["side_by_side"][0]


def test_cells() -> None:
    assert cell(None) == cell(float("nan")) == "-"
    assert cell(Estimate(0.5, 0.25, 0.75)) == "0.5 (0.25 to 0.75)"
    assert cell(Estimate(0.5, float("nan"), float("nan"))) == "0.5"
    assert cell(3) == "3"
    assert cell("none") == "none"
