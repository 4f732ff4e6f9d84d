"""Reading ahead where experts have copies of several precisions: the copy that is asked for later, not another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import saved

from collegium.offload.cache import Found
from collegium.offload.cost import CostModel
from collegium.offload.events import EventLog
from collegium.offload.geometry import Geometry
from collegium.offload.model import load_offloaded
from collegium.offload.policies import find_policy
from collegium.offload.precision import find_precision
from collegium.offload.predictors.base import Moment, Prediction, Predictor
from collegium.offload.prefetch import Prefetch
from collegium.offload.simulate import SimulationSettings, simulate
from collegium.offload.simulate_passes import Passes
from collegium.offload.store import pack
from collegium.trace import record_generate

COST = CostModel(read_bandwidth=1e9, read_latency=1e-4, memory_bandwidth=1e10, measured="made up")
E, K, L = 12, 3, 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ahead")
    folder, _ = saved("qwen3_moe", root / "model", num_local_experts=E, num_experts_per_tok=K, num_hidden_layers=L)
    pack(folder, root / "store", bits=(32, 8))
    return root / "store"


class Knowing(Predictor):
    """The next layer's experts of every pass of a run that was recorded."""

    def __init__(self, passes: Passes) -> None:
        super().__init__(passes.geometry)
        self._passes, self._at = passes, -1

    def begin(self) -> None:
        self._at = -1

    def predict(self, moment: Moment) -> list[Prediction]:
        self._at += moment.layer == -1
        layer = moment.layer + 1
        if layer == self.geometry.num_layers:
            return []
        scores = np.zeros(E)
        scores[self._passes.step(self._at, layer).experts] = 1
        return [Prediction(layer, scores)]


class Roomy(SimulationSettings):
    """A slot for every copy, as an engine without a limit has."""

    def slots(self, geometry: Geometry, used: tuple[int, ...]) -> dict[int, int]:
        return dict.fromkeys(used, geometry.total)


def table(folder: Path) -> str:
    """Every other expert in 8 bits, as a plan."""
    layers = [{"layer": layer, "bits": [(32, 8)[(expert + layer) % 2] for expert in range(E)]} for layer in range(L)]
    plan = {"model": "m", "fingerprint": None, "created": "now", "collegium": "0", "layers": layers}
    (folder / "plan.json").write_text(json.dumps(plan))
    return f"table:plan={folder / 'plan.json'}"


def asked(log: EventLog) -> list[tuple[int, ...]]:
    """Requests of each layer of each pass. Whether one that is read ahead has come is a matter of time, and so is its
    place among the others."""
    found = np.where(log["found"] == Found.LATE, Found.PREFETCHED, log["found"])
    columns = (log["step"] - log["step"].min(), log["layer"], log["expert"], log["bits"], found)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("policy", ["lfu", "expertflow"])
def test_under_a_table_the_copies_that_are_read_ahead_are_those_asked_for(
    store: Path, tmp_path: Path, policy: str
) -> None:
    ids = torch.randint(3, 64, (1, 2), generator=torch.Generator().manual_seed(0))
    precision = find_precision(table(tmp_path))

    def run(out: Path, **more: Any) -> tuple[Any, Any, dict[str, float], dict[int, int], int]:
        with load_offloaded(store, context=64, policy=find_policy(policy), precision=precision, **more) as found:
            found.engine.record_events()
            trace = record_generate(found.model, [{"input_ids": ids}], out, max_new_tokens=10)
            fresh = sum(int(pool.cache._fresh.sum()) for pool in found.engine.pools.values())
            sizes = {bits: found.source.layers[0].layouts[bits].nbytes for bits in (32, 8)}
            return trace, found.engine.log, found.counters(), sizes, fresh

    trace = run(tmp_path / "first")[0]
    passes = Passes(trace, by="recorded")
    prefetch = Prefetch(width=E, threshold=0.5)  # all that it names, and nothing else
    again, log, counters, sizes, fresh = run(
        tmp_path / "second", predictor=lambda model, geometry: Knowing(passes), prefetch=prefetch
    )
    for layer in trace.layers:  # a prediction moves bytes only
        np.testing.assert_array_equal(again.experts(layer), trace.experts(layer))
    ahead = counters["prefetched"] + counters["late"]
    assert ahead > 20
    assert {bits for *_, bits, found in asked(log) if found == Found.PREFETCHED} == {32, 8}
    # every read, ahead or on demand, is of a copy that was asked for
    assert fresh == 0
    assert counters["read_demand"] + counters["read_prefetch"] == ahead + counters["misses"]
    simulated = simulate(
        passes,
        Roomy(find_policy(policy), 1, sizes, precision, prefetch=prefetch),
        COST,
        predictor=Knowing(passes),
    )
    assert simulated.wasted_bytes.sum() == 0
    assert simulated.useful_bytes.sum() > 0
    assert asked(simulated.log) == asked(log)
