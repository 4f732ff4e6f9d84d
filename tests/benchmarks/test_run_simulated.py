"""The benchmark's simulated decode on a tiny model: the engine's routing, what it read, and rows with a goal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collegium.benchmarks import _run_simulated
from collegium.benchmarks._run_files import make
from collegium.benchmarks._run_model import Shape
from collegium.benchmarks._run_routing import routing_table
from collegium.benchmarks._run_sides import Ours, drive
from collegium.offload.cost import CostModel
from collegium.offload.model import load_offloaded
from collegium.trace import Trace

SMALL = Shape(layers=2, d=256, f=96, E=32, K=4, heads=4, vocabulary=512)
DISK = CostModel(read_bandwidth=1e9, read_latency=0, memory_bandwidth=1e10, measured="made up")
RUNS = [
    {"name": name, "prompt": [*range(at, at + 6)], "prompts": 2, "warm": [*range(at + 6, at + 10)], "decode": decode}
    for name, at, decode in (("random", 100, [*range(110, 118)]), ("replayed", 0, [*range(10, 18)]))
]


class _Few(Ours):
    """Ours with 16 of 64 experts in memory."""

    def __init__(self, path: Path) -> None:
        self.loaded = load_offloaded(path, experts=16, context=64, dense_bits=8)
        self.model = self.loaded.model


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Any]:
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("simulated")
    table = routing_table(SMALL, 24)
    make(SMALL, table, folder / "store", folder / "model.gguf")
    side = _Few(folder / "store")
    recording = _run_simulated.Recording(side.loaded, DISK)
    found = drive(side, {"runs": RUNS}, recording)
    recording.save(folder / "recording.npz")
    side.loaded.close()
    return folder / "recording.npz", found, table


def test_what_was_routed_is_in_the_trace(recorded: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    file, found, table = recorded
    traces: list[Trace] = []

    def keep(held: Any, about: Any, folder: Path) -> Trace:
        traces.append(kept(held, about, file.with_name("trace")))
        return traces[-1]

    kept = _run_simulated.trace_of
    monkeypatch.setattr(_run_simulated, "trace_of", keep)
    list(_run_simulated.predicted(file, found, {"random": "random routing"}))
    ids = [id for run in RUNS for id in [*run["prompt"]] * 3 + run["warm"] + run["decode"]]  # type: ignore[operator]
    for layer in range(2):
        np.testing.assert_array_equal(np.sort(traces[0].experts(layer)), np.sort(table[ids, layer]))
    assert np.unique(traces[0].column("sequence")).tolist() == [*range(6)]
    assert traces[0].column("position")[-1] == 17


def test_every_read_is_simulated_and_the_goal_is_two_sided(recorded: tuple[Path, Any, Any]) -> None:
    file, found, _ = recorded
    rows = list(_run_simulated.predicted(file, found, {"random": "in 25%, random", "replayed": "in 25%, replayed"}))
    assert [row.name for row in rows] == ["simulated decode, in 25%, random", "simulated decode, in 25%, replayed"]
    for row, run in zip(rows, RUNS, strict=True):
        assert row.ours > 0
        assert row.peer == np.median(found[run["name"]]["decode"])
        assert (row.within, row.goal, row.peer_name) == (0.15, None, "measured")
        assert "100.0% of them simulated alike" in row.limit


def test_the_timed_tokens_are_not_what_times_were_taken_of(recorded: tuple[Path, Any, Any]) -> None:
    file, found, _ = recorded
    slow = {name: {**of, "decode": [1e3 * seconds for seconds in of["decode"]]} for name, of in found.items()}
    before, after = (next(_run_simulated.predicted(file, of, {"random": "x"})) for of in (found, slow))
    assert before.ours == after.ours
    assert after.peer == pytest.approx(1e3 * (before.peer or 0))
