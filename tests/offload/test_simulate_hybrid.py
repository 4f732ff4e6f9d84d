"""Two processors in the simulator: its times are those of the schedule, and all on one is what it was without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_simulate import COST, Half, Oracle, random_trace, settings_of

from collegium.errors import ConfigError
from collegium.offload.cache import ExpertCache, Found
from collegium.offload.model import Settings
from collegium.offload.predictors.base import Moment, Prediction, Predictor
from collegium.offload.prefetch import Prefetch
from collegium.offload.schedule.hybrimoe import Hybrid
from collegium.offload.simulate import simulate
from collegium.offload.simulate_batch import batched
from collegium.offload.simulate_hybrid import save_plans, simulate_hybrid
from collegium.offload.simulate_passes import Passes
from measure_traces import make_trace

TIMES = Hybrid(fast=0.5, slow=1.0, slow_start=0.79, transfer=0.418)


def test_by_hand(tmp_path: Path) -> None:
    """The dossier's vector: a and b are there, c is moved, and d is computed where it lies."""
    a, b, c, d, none = range(5)
    rows = [[a, b, none], *[[a, c, none]] * 4, [a, b, d]]
    trace = make_trace(tmp_path, {0: rows}, 4, sequences=range(6))
    passes = Passes(trace).arranged([[0], [1, 2, 3, 4, 5]])
    found = simulate_hybrid(passes, settings_of(capacity=4), COST, TIMES)
    first, second = found.plans
    # nothing is there: a comes at 0.418 and is done at 0.918, b at 1.418; alone on the other it would be at 1.79
    assert (first.fast, first.moved, first.slow) == ((a, b), (a, b), ())
    assert first.makespan == pytest.approx(1.418)
    assert (second.fast, second.moved, second.slow) == ((a, b, c), (c,), (d,))
    assert second.makespan == pytest.approx(1.79)
    assert found.seconds == pytest.approx([1.418 + 1.79])
    assert found.stall == pytest.approx([0.418])
    assert found.slow_experts.tolist() == [1]
    assert found.slow_share == pytest.approx(1 / 6)
    assert found.demand_bytes.tolist() == [3000]
    assert found.decode_seconds == pytest.approx(1.418 + 1.79 + 2 * (1 + 10))
    assert found.computing == pytest.approx(5 * 0.5 + 1.79)


@pytest.mark.parametrize("size", [1, 4])
def test_with_room_every_layer_takes_what_its_schedule_says(tmp_path: Path, size: int) -> None:
    passes = batched(Passes(random_trace(tmp_path)), size)
    times = Hybrid(fast=0.5, slow=1.0, slow_start=0.79, transfer=2, fast_token=0.1, slow_expert=0.2)
    # what the cost model says of a disk and of calls on the slow processor is not the link's or the fast one's
    disk = {"readers": 3, "read_delay": 0.7, "wake_seconds": 0.1, "call_seconds": 0.3, "spare": False}
    cost = COST.model_copy(update=disk)
    found = simulate_hybrid(passes, settings_of(capacity=12), cost, times)
    assert found.seconds.sum() == pytest.approx(sum(one.makespan for one in found.plans))
    assert len(found.plans) == 2 * len(passes)
    assert 0 < found.slow_share < 1
    for one in found.plans:
        step = passes.step(one.number, one.layer)
        assert sorted(one.fast + one.slow) == step.experts.tolist()
        slow = times.timed((), range(len(step.experts)), np.zeros(len(step.experts), bool), step.counts)
        assert one.makespan <= slow.makespan + 1e-9


def test_all_on_one_processor(tmp_path: Path) -> None:
    passes = Passes(random_trace(tmp_path))
    fast = simulate_hybrid(passes, settings_of(capacity=5), COST, TIMES, on="fast")
    cost = COST.model_copy(
        update={"read_latency": 0.418, "read_bandwidth": np.inf, "expert": {16: ((1.0, 0.5), (2.0, 0.5))}}
    )
    alone = simulate(passes, settings_of(capacity=5), cost)
    for column in ("step", "layer", "expert", "found", "evicted", "waited"):
        np.testing.assert_array_equal(fast.log[column], alone.log[column])
    assert fast.decode_seconds == alone.decode_seconds
    assert fast.slow_experts.sum() == 0
    slow = simulate_hybrid(passes, settings_of(capacity=5), COST, TIMES, on="slow", predictor=Oracle(passes))
    assert (slow.requests, slow.reading, slow.slow_share, len(slow.log)) == (0, 0, 1, 0)
    assert slow.seconds == pytest.approx([60 * (2 + 0.79)] * 2)


@pytest.mark.parametrize("policy", ["lru", "arc", "opt", "hybrimoe", "expertflow", "moe_infinity"])
def test_every_expert_is_computed_once_also_with_too_few_slots(tmp_path: Path, policy: str) -> None:
    passes = batched(Passes(random_trace(tmp_path)), 6)
    for capacity in (2, 5):
        found = simulate_hybrid(passes, settings_of(policy, capacity), COST, TIMES)
        asked = sum(len(passes.step(n, layer).experts) for n in range(len(passes)) for layer in range(2))
        assert found.requests + found.slow_experts.sum() == asked
        assert found.distance is None
        record = found.record()
        assert record["on"] == "both"
        assert sum(layer["slow_experts"] for layer in record["layers"]) == found.slow_experts.sum()
        assert record["expert_ms_per_token"] == pytest.approx(1000 * found.seconds.sum() / 60)


def test_what_is_read_ahead_over_the_link_saves_time(tmp_path: Path) -> None:
    passes = Passes(random_trace(tmp_path))
    plain = simulate_hybrid(passes, settings_of(capacity=10), COST, TIMES)
    ahead = simulate_hybrid(passes, settings_of(capacity=10), COST, TIMES, predictor=Oracle(passes))
    assert ahead.found[:, Found.PREFETCHED].sum() > 0
    assert ahead.seconds.sum() < plain.seconds.sum()


class TwoAhead(Predictor):
    """At layer 0 it names experts 0 and 1 of layers 1 and 2."""

    horizon = 2

    def predict(self, moment: Moment) -> list[Prediction]:
        scores = np.array([1.0, 0.9, 0.0, 0.0])
        return [Prediction(layer, scores) for layer in (1, 2)] if moment.layer == 0 else []


def test_reading_ahead_by_impact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layer 1 one of two experts is there and the slow processor has time for the other; of layer 2 neither is, so
    that to load one of them saves more although it is farther."""
    times = Hybrid(fast=1, slow=1.5, slow_start=0, transfer=5)
    trace = make_trace(tmp_path, {layer: [[0, 1]] for layer in range(3)}, 4)
    orders = {}
    request = ExpertCache.prefetch
    for order in ("score", "impact"):
        asked: list[tuple[int, int]] = []

        def noted(cache: ExpertCache, layer: int, expert: int, lender: Any, asked: Any = asked) -> Any:
            asked.append((layer, expert))
            return request(cache, layer, expert, lender)

        monkeypatch.setattr(ExpertCache, "prefetch", noted)
        resident = ExpertCache.is_resident

        def there(cache: ExpertCache, layer: int, of: Any = resident) -> Any:
            return of(cache, layer) | ((layer == 1) & (np.arange(4) == 0))

        with monkeypatch.context() as patched:
            patched.setattr(ExpertCache, "is_resident", there)
            asked_for = settings_of(capacity=12, prefetch=Prefetch(width=2, depth=2, order=order))  # type: ignore
            simulate_hybrid(Passes(trace), asked_for, COST, times, predictor=TwoAhead(Passes(trace).geometry))
        orders[order] = asked
    assert orders["score"] == [(1, 1), (2, 0), (2, 1)]
    assert orders["impact"][0] == (2, 0)
    assert sorted(orders["impact"]) == sorted(orders["score"])


def test_plans_are_written(tmp_path: Path) -> None:
    found = simulate_hybrid(Passes(random_trace(tmp_path / "t")), settings_of(capacity=6), COST, TIMES)
    save_plans(found.plans, tmp_path / "plans.parquet")
    table = pq.read_table(tmp_path / "plans.parquet").to_pylist()
    assert len(table) == len(found.plans) == 120
    assert table[7]["fast"] == list(found.plans[7].fast)
    assert {*table[0]} == {"pass", "layer", "fast", "moved", "slow", "makespan"}


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    passes = Passes(random_trace(tmp_path, K=3))
    with pytest.raises(ConfigError, match="empty memory"):
        simulate_hybrid(passes, settings_of(first_touch="prefilled"), COST, TIMES)
    two = settings_of(capacity=10, expert_bytes={16: 1000, 4: 250}, precision=Half())
    with pytest.raises(ConfigError, match="one copy"):
        simulate_hybrid(passes, two, COST, TIMES)

    class Needy(Oracle):
        needs = frozenset({"gate_input"})

    with pytest.raises(ConfigError, match="routers' inputs"):
        simulate_hybrid(passes, settings_of(), COST, TIMES, predictor=Needy(passes))
    with pytest.raises(ConfigError, match="two processors"):
        simulate(passes, settings_of(prefetch=Prefetch(order="impact")), COST)
    with pytest.raises(ConfigError, match="two processors"):
        Settings(prefetch=Prefetch(order="impact"))
