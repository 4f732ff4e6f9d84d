"""Counts that SGLang recorded without tokens: what they add up to, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from importer_files import LAYERS, WRITERS, E, K, Run, sglang_data
from typer.testing import CliRunner

from collegium.cli.main import app
from collegium.errors import ConfigError, StatisticsError, TraceError
from collegium.measure.collect import layer_entry
from collegium.measure.imported import import_statistics
from collegium.measure.load import load, load_of_statistics
from collegium.measure.statistics import Statistics
from collegium.sites import sites
from collegium.trace.importers import Known, import_trace, read_counts
from tiny import tiny_model

ROWS, SLOTS = 6, 14
FACTS = Known(top_k=K)


def counts_of(run: Run) -> np.ndarray:
    """``[L, E]`` assignments of a run, rows of dense layers zero."""
    counts = np.zeros((ROWS, E), np.int64)
    for place, layer in enumerate(LAYERS):
        counts[layer] = np.bincount(run.all[:, place].ravel(), minlength=E)
    return counts


def stat_data(run: Run, steps: int = 8, used: int = 3) -> dict[str, Any]:
    """Dealt over the first passes of a buffer."""
    logical = torch.zeros(steps, ROWS, E, dtype=torch.int32)
    whole = torch.from_numpy(counts_of(run))
    for step in range(used):
        logical[step] = whole // used + (step < whole % used)
    return {"rank": 0, "logical_count": logical, "average_utilization_rate_over_window": 0.5}


def per_pass_data(run: Run, rank: int = 0) -> dict[str, Any]:
    """The counts of the passes of a per_token recording, by physical slot."""
    data = sglang_data(run, ROWS, SLOTS)
    records = []
    for record in data["records"]:
        counts = torch.zeros(ROWS, SLOTS, dtype=torch.int32)
        for layer in LAYERS:
            ids = record["topk_ids_of_layer"][layer].flatten().long()
            counts[layer] = torch.bincount(ids[ids >= 0], minlength=SLOTS)
        part = {key: record[key] for key in ("forward_pass_id", "gatherer_key")}
        records.append({**part, "rank": rank, "global_physical_count": counts})
    return {**data, "records": records}


def written(folder: Path, *data: object) -> list[Path]:
    files = [folder / f"dump_{number}.pt" for number in range(len(data))]
    for file, content in zip(files, data, strict=True):
        torch.save(content, file)
    return files


def imported(folder: Path, *data: object, facts: Known = FACTS) -> tuple[Statistics, tuple[str, ...]]:
    found = import_statistics("sglang", written(folder, *data), folder / "s", facts, overwrite=True)
    assert found is not None
    return found


@pytest.mark.parametrize("make", [stat_data, per_pass_data])
def test_counts_are_those_of_the_tokens(tmp_path: Path, make: Any) -> None:
    run = Run()
    found, notes = imported(tmp_path, make(run))
    loaded = Statistics.load(tmp_path / "s")
    assert loaded.layers == found.layers == list(LAYERS)
    expected = counts_of(run)
    for layer in LAYERS:
        assert loaded.get(layer, "n").tolist() == expected[layer].tolist()
        assert loaded.get(layer, "n_tokens") == len(run.tokens)
    assert loaded.meta.tokens == len(run.tokens)
    assert loaded.meta.num_layers == ROWS
    assert [(one.num_experts, one.top_k, one.hidden_size) for one in loaded.meta.layers] == [(E, K, 0)] * 3
    assert all(note in loaded.meta.data[0] for note in notes)
    passes = 3 if make is stat_data else len(sglang_data(run)["records"])
    assert notes[0].startswith(f"counts of {passes} forward passes")


def test_the_load_is_that_of_the_trace(tmp_path: Path) -> None:
    run = Run()
    statistics, _ = imported(tmp_path, stat_data(run))
    trace, _ = import_trace("sglang", written(tmp_path, sglang_data(run)), tmp_path / "t")
    for ours, theirs in zip(load_of_statistics(statistics), load(trace), strict=True):
        assert (ours.layer, ours.counts.tolist(), ours.dead, ours.cold) == (
            theirs.layer,
            theirs.counts.tolist(),
            theirs.dead,
            theirs.cold,
        )
        assert ours.max_violation.value == pytest.approx(theirs.max_violation.value)
        assert ours.entropy.value == pytest.approx(theirs.entropy.value)
        assert np.isnan(ours.cv.low)


def test_replicated_experts_are_summed(tmp_path: Path) -> None:
    data = per_pass_data(Run())
    table = data["last_physical_to_logical_map"]
    counts = torch.zeros(ROWS, SLOTS, dtype=torch.int64)
    counts[2] = torch.arange(SLOTS)
    record = {**data["records"][0], "global_physical_count": counts}
    found, notes = imported(tmp_path, {**data, "records": [record]}, facts=Known(top_k=1))
    expected = [sum(slot for slot in range(SLOTS) if table[2, slot] == expert) for expert in range(E)]
    assert found.get(2, "n").tolist() == expected
    assert any("only the last map" in note for note in notes)


def test_dumps_are_added_and_ranks_of_per_pass_too(tmp_path: Path) -> None:
    first, second = Run(), Run(seed=9)
    expected = counts_of(first) + counts_of(second)
    for make in (stat_data, per_pass_data):
        found, _ = imported(tmp_path, make(first), make(second))
        assert [found.get(layer, "n").tolist() for layer in LAYERS] == expected[list(LAYERS)].tolist()


def test_ranks_that_counted_alike_count_once(tmp_path: Path) -> None:
    run = Run()
    found, notes = imported(tmp_path, per_pass_data(run), per_pass_data(run, rank=1))
    assert found.meta.tokens == len(run.tokens)
    assert any("several ranks recorded alike" in note for note in notes)


def test_what_is_not_understood_is_said(tmp_path: Path) -> None:
    data = stat_data(Run(), steps=3)
    _, notes = imported(tmp_path, {**data, "mood": "good"})
    assert any("left out: field 'mood'" in note for note in notes)
    assert any("may have been overwritten" in note for note in notes), "the buffer is full"
    found, notes = imported(tmp_path, {"logical_count": data["logical_count"].sum(0)}, facts=Known(top_k=2))
    assert any("number of tokens is not known" in note for note in notes)
    assert [entry.name for entry in found.meta.statistics] == ["n"]
    assert found.meta.tokens == 0


def test_files_with_tokens_are_left_to_the_trace(tmp_path: Path) -> None:
    run = Run()
    for format, write in WRITERS.items():
        files = write(tmp_path, run)
        assert read_counts(format, files, FACTS) is None
        assert import_statistics(format, files, tmp_path / "s", FACTS) is None
    assert not (tmp_path / "s").exists()
    with pytest.raises(TraceError, match="holds counts"):
        import_trace("sglang", written(tmp_path, stat_data(run)), tmp_path / "t", FACTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.update(logical_count=torch.ones(2, ROWS, E)),
            "'logical_count' must be whole numbers, not float32",
        ),
        (lambda d: d.update(logical_count=torch.ones(E, dtype=torch.int32)), r"must be counts .* not \[12\]"),
        (lambda d: d["logical_count"].sub_(9), "lowest value of -9"),
        (lambda d: d["logical_count"].zero_(), "counts nothing"),
    ],
)
def test_a_stat_file_names_the_field(tmp_path: Path, change: Any, message: str) -> None:
    data = stat_data(Run())
    change(data)
    with pytest.raises(TraceError, match=rf"dump_0\.pt.*{message}"):
        imported(tmp_path, data)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("last_physical_to_logical_map"), "cannot be told apart from experts; record again in .* stat"),
        (lambda d: d["last_physical_to_logical_map"].fill_(3), "row 0 does not place every expert"),
        (
            lambda d: d["records"][1].update(global_physical_count=torch.ones(ROWS, 3, dtype=torch.int32)),
            r"records\.1\.global_physical_count' must be counts \[6, 14\], not \[6, 3\]",
        ),
        (lambda d: d["records"][1].pop("global_physical_count"), r"records\.1\.global_physical_count'"),
    ],
)
def test_a_per_pass_file_names_the_field(tmp_path: Path, change: Any, message: str) -> None:
    data = per_pass_data(Run())
    change(data)
    with pytest.raises(TraceError, match=rf"dump_0\.pt.*{message}"):
        imported(tmp_path, data)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    run = Run()
    stat, passes = stat_data(run), per_pass_data(run)
    other_rank, small = {**stat_data(Run(seed=2)), "rank": 1}, {"rank": 0, "logical_count": torch.ones(1, 2, 3).int()}
    moved = {**passes, "last_physical_to_logical_map": passes["last_physical_to_logical_map"].roll(1, 1)}
    for data, message in (
        ((stat, passes), "'logical_count' is missing"),
        ((passes, stat), "no counts of per_pass mode"),
        ((stat, stat), "would count twice"),
        ((stat, other_rank), "summed over ranks"),
        ((stat, small), r"of \[2, 3\] layers and experts"),
        ((passes, moved), "is not that of"),
    ):
        with pytest.raises(TraceError, match=message):
            imported(tmp_path, *data)


def test_k_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--top-k"):
        imported(tmp_path, stat_data(Run()), facts=Known())
    with pytest.raises(TraceError, match="12 experts there, not 16"):
        imported(tmp_path, stat_data(Run()), facts=Known(top_k=K, num_experts=16))


def collegium(*arguments: object) -> Any:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result


def test_from_the_command_line_to_the_load(tmp_path: Path) -> None:
    run = Run()
    (file,) = written(tmp_path, stat_data(run))
    out = tmp_path / "counts"
    text = collegium("import-trace", "sglang", file, "--out", out, "--top-k", K)
    assert f"hold counts: statistics of {len(run.tokens)} tokens and 3 layers" in text.stdout
    assert "note: counts of 3 forward passes" in text.stderr
    with pytest.raises(StatisticsError, match="--overwrite"):
        collegium("import-trace", "sglang", file, "--out", out, "--top-k", K)
    record = json.loads(
        collegium("import-trace", "sglang", file, "--out", out, "--top-k", K, "--overwrite", "--json").stdout
    )
    assert (record["statistics"], record["tokens"], record["layers"]) == (str(out), len(run.tokens), list(LAYERS))

    found = json.loads(collegium("measure", out, "--json").stdout)
    assert set(found["metrics"]) == {"load"}
    rows = found["metrics"]["load"]["results"]
    assert [row["counts"] for row in rows] == counts_of(run)[list(LAYERS)].tolist()
    assert rows[0]["max_violation"]["low"] is None
    assert found["intervals"].startswith("none")
    assert "hold only how often" in found["not_measured"]["locality"]
    assert "hold only how often" in found["not_measured"]["redundancy"]
    table = collegium("measure", out, "-m", "load").stdout
    assert "load: How evenly" in table
    assert "intervals: none" in table
    with pytest.raises(ConfigError, match="locality needs every token"):
        collegium("measure", out, "-m", "locality")


def test_counts_beside_a_trace(tmp_path: Path) -> None:
    run = Run()
    imported(tmp_path, stat_data(run))
    import_trace("sglang", written(tmp_path, sglang_data(run)), tmp_path / "t")
    for pair in ((tmp_path / "s", tmp_path / "t"), (tmp_path / "t", tmp_path / "s"), (tmp_path / "s", tmp_path / "s")):
        found = json.loads(collegium("compare", *pair, "--json").stdout)
        assert [row["layer"] for row in found["side_by_side"]] == list(LAYERS)
        for row in found["side_by_side"]:
            first, second = row["MaxVio"]
            assert first["value"] == pytest.approx(second["value"])
            assert "SRP(16)" not in row
        assert found["metrics"] == {}
        assert "hold only how often" in found["not_measured"]["fluctuation"]


def test_the_model_gives_names_and_sizes(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "model")
    blocks = sites(model)
    counts = torch.randint(1, 9, (2, len(blocks), blocks[0].num_experts), dtype=torch.int32)
    (file,) = written(tmp_path, {"rank": 0, "logical_count": counts})
    collegium("import-trace", "sglang", file, "--out", tmp_path / "s", "--model", tmp_path / "model")
    found = Statistics.load(tmp_path / "s")
    assert found.meta.family == "qwen3_moe"
    assert found.meta.fingerprint
    for entry, site in zip(found.meta.layers, blocks, strict=True):
        assert entry.model_copy(update={"path": site.path}) == layer_entry(site), "as if it was calibrated"
    with pytest.raises(ConfigError):  # a folder of something else stays
        collegium("import-trace", "sglang", file, "--out", tmp_path / "model", "--top-k", K)
    assert not (tmp_path / "model" / "statistics.json").exists()
