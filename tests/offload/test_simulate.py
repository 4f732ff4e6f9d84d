"""The simulator: hand-worked times, its bound, passes of a trace, and that predictions only move bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_drive import Drive, stream_of

from collegium.errors import ConfigError, StorageError, TraceError
from collegium.offload.cache import Found
from collegium.offload.cost import CostModel, measure_cost
from collegium.offload.geometry import Geometry
from collegium.offload.policies import find_policy
from collegium.offload.precision.base import SKIP, Choice, PrecisionPolicy, PrecisionSettings
from collegium.offload.predictors.base import FEW, Moment, Prediction, Predictor
from collegium.offload.prefetch import Prefetch
from collegium.offload.simulate import Simulation, SimulationSettings, simulate
from collegium.offload.simulate_bound import optimal_hits
from collegium.offload.simulate_passes import Passes
from collegium.trace import Trace
from measure_traces import make_trace

# a read takes 2 s, an expert 1 s to compute, the rest of a layer 1 s, of a pass 10 s
COST = CostModel(
    read_bandwidth=1000,
    read_latency=1,
    memory_bandwidth=1000,
    layer_seconds=1,
    outside_seconds=10,
    measured="a test",
)


def settings_of(policy: str = "lru", capacity: int = 4, **more: Any) -> SimulationSettings:
    return SimulationSettings(find_policy(policy), capacity, more.pop("expert_bytes", {16: 1000}), **more)


def random_trace(folder: Path, N: int = 60, E: int = 6, K: int = 2, seed: int = 0, **more: Any) -> Trace:
    draw = np.random.default_rng(seed)
    experts = {layer: np.argsort(draw.random((N, E)) * np.arange(1, E + 1), axis=1)[:, :K] for layer in (0, 3)}
    weights = {layer: np.sort(draw.random((N, K)))[:, ::-1] for layer in experts}
    return make_trace(folder, experts, E, weights=weights, sequences=np.arange(N) // 20, **more)


class Oracle(Predictor):
    """Knows the next layer's experts, or names all the others."""

    def __init__(self, passes: Passes, wrong: bool = False) -> None:
        super().__init__(passes.geometry)
        self._passes, self._wrong, self._at = passes, wrong, -1

    def predict(self, moment: Moment) -> list[Prediction]:
        self._at += moment.layer == -1
        layer = moment.layer + 1
        if layer == self.geometry.num_layers:
            return []
        right = np.zeros(self.geometry.experts[layer])
        right[self._passes.step(self._at, layer).experts] = 1
        return [Prediction(layer, 1 - right if self._wrong else right)]


def test_times_by_hand(tmp_path: Path) -> None:
    # one layer, two experts a token, two slots
    trace = make_trace(tmp_path, {0: [[0, 1], [0, 1], [0, 2]]}, 3, weights={0: [[0.6, 0.4]] * 3})
    found = simulate(trace, settings_of(capacity=2), COST)
    # token 0: layer 1 s, both missing. Expert 0 comes at 3 and is computed until 4; expert 1 comes at 5, until 6
    # token 1: 10 s outside, 1 s layer, 2 s to compute. Token 2: expert 0 is computed while expert 2 comes
    first = 1 + 2 + 1 + 1 + 1 + 10
    second = 1 + 2 + 10
    third = 1 + 1 + 1 + 1 + 10
    assert found.decode_seconds == first + second + third
    assert found.stall.tolist() == [2 + 1 + 1]
    assert found.reading == 6
    assert found.computing == 6
    assert found.overlap == pytest.approx(1 - 4 / 6)
    assert found.tokens_per_second == pytest.approx(3 / (first + second + third))
    assert found.log["found"].tolist() == [Found.MISS, Found.MISS, Found.HIT, Found.HIT, Found.HIT, Found.MISS]
    assert found.log["evicted"].tolist() == [-1, -1, -1, -1, -1, 1]
    assert found.log["waited"].tolist() == [2, 1, 0, 0, 0, 1]
    assert found.demand_bytes.tolist() == [3000]
    assert found.summary()["bytes_per_token"] == 1000
    assert found.summary()["hit"] == found.hit_rate == 0.5


def test_what_is_read_ahead_in_time_costs_no_wait(tmp_path: Path) -> None:
    # two layers of one expert a token that changes; layer 1 is predicted while layer 0 is computed
    trace = make_trace(tmp_path, {0: [[0]] * 4, 1: [[0], [1], [2], [3]]}, 4)
    passes = Passes(trace)
    slow = COST.model_copy(update={"layer_seconds": 5.0})
    found = simulate(passes, settings_of(capacity=5), slow, predictor=Oracle(passes))
    assert found.found[1].tolist() == [0, 4, 0, 0, 0]
    assert found.stall.tolist() == [0, 0]
    assert found.useful_bytes.tolist() == [1000, 4000]
    # layers that are half a second too short: each read is on its way when it is asked for
    short = COST.model_copy(update={"layer_seconds": 0.5})
    found = simulate(passes, settings_of(capacity=5), short, predictor=Oracle(passes))
    assert found.found.tolist() == [[3, 0, 1, 0, 0], [0, 0, 4, 0, 0]]
    assert found.stall.tolist() == [1.5, 2.0]


def test_wrong_predictions_move_bytes_and_nothing_else(tmp_path: Path) -> None:
    passes = Passes(random_trace(tmp_path))
    plain = simulate(passes, settings_of(capacity=8), COST)
    wrong = simulate(passes, settings_of(capacity=8), COST, predictor=Oracle(passes, wrong=True))
    right = simulate(passes, settings_of(capacity=8), COST, predictor=Oracle(passes))
    for one in (wrong, right):
        assert one.requests == plain.requests
        for column in ("step", "layer"):
            np.testing.assert_array_equal(one.log[column], plain.log[column])
        asked = [{*zip(run.log["step"].tolist(), run.log["layer"].tolist(), run.log["expert"].tolist(), strict=True)}
                 for run in (one, plain)]  # fmt: skip
        assert asked[0] == asked[1]
        loads = one.demand_bytes.sum() + one.useful_bytes.sum() + one.wasted_bytes.sum()
        assert loads >= 1000 * (one.requests - (one.optimal_hits or 0))  # no loading scheme beats MIN in loads
    assert wrong.wasted_bytes.sum() > 0
    assert wrong.unused.sum() > 0
    assert right.hit_rate > plain.hit_rate > wrong.hit_rate - 0.05
    assert right.stall.sum() < plain.stall.sum()
    assert plain.unused.sum() == plain.wasted_bytes.sum() == plain.useful_bytes.sum() == 0


def test_bytes_are_all_accounted_for(tmp_path: Path) -> None:
    passes = Passes(random_trace(tmp_path))
    for seed, width in enumerate((1, 2, 4)):
        noisy = Oracle(passes, wrong=bool(seed % 2))
        found = simulate(passes, settings_of(capacity=9, prefetch=Prefetch(width=width)), COST, predictor=noisy)
        read = found.demand_bytes.sum() + found.useful_bytes.sum() + found.wasted_bytes.sum()
        begun = found.reading / COST.read_seconds(1000)
        assert read / 1000 - begun == pytest.approx(0, abs=1)  # the last may be under way at the end
        assert found.found.sum() == 60 * 2 * 2


def test_demand_only_streams_repeat_and_do_not_depend_on_times(tmp_path: Path) -> None:
    passes = Passes(random_trace(tmp_path))
    fast = COST.model_copy(update={"read_latency": 0.0, "read_bandwidth": 1e12})
    for name in ("lru", "arc:scope=global", "hobbit", "expertflow"):
        logs = [simulate(passes, settings_of(name, 5), cost).log for cost in (COST, COST, fast)]
        for column in ("step", "layer", "expert", "found", "evicted", "bytes"):
            np.testing.assert_array_equal(logs[0][column], logs[1][column])
            np.testing.assert_array_equal(logs[0][column], logs[2][column])


def test_the_bound_is_the_policy_opt(tmp_path: Path) -> None:
    passes = Passes(random_trace(tmp_path), by="recorded")  # prompts of many tokens: waves as well
    for capacity in (2, 3, 5, 8, 12):
        for first_touch in ("miss", "prefilled"):
            demand = Prefetch(prompt=0)
            asked = settings_of("opt:scope=global", capacity, first_touch=first_touch, prefetch=demand)
            found = simulate(passes, asked, COST)
            assert found.optimal_hits == found.found[:, Found.HIT].sum()
            assert found.distance == 0
    assert simulate(passes, settings_of("lru:scope=global", 5), COST).distance >= 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), max_size=30), st.integers(1, 6))
def test_the_bound_on_any_stream(steps: list[list[int]], capacity: int) -> None:
    geometry = Geometry(experts=(6,), top_k=(3,), layers=(0,))
    layered = [(0, step) for step in steps]
    drive = Drive.of("opt:scope=global", geometry, capacity, layered)
    for layer, experts in layered:
        drive.step(layer, experts)
    stream = stream_of(geometry, layered)
    assert optimal_hits(stream, 6, capacity) == (drive.log["found"] == Found.HIT).sum()


def test_all_experts_in_memory_miss_only_first_touches(tmp_path: Path) -> None:
    trace = random_trace(tmp_path)
    found = simulate(trace, settings_of(capacity=100), COST)
    distinct = sum(len(np.unique(trace.experts(layer))) for layer in trace.layers)
    assert found.found[:, Found.MISS].sum() == distinct
    assert found.evictions.sum() == 0
    filled = simulate(trace, settings_of(capacity=100, first_touch="prefilled"), COST)
    assert filled.hit_rate == 1
    assert filled.reading == filled.stall.sum() == filled.demand_bytes.sum() == 0


class TestPasses:
    def test_prompts_are_unrolled_where_nothing_was_decoded(self, tmp_path: Path) -> None:
        passes = Passes(random_trace(tmp_path))
        assert passes.by == "tokens"
        assert passes.unrolled
        assert len(passes) == 60
        assert np.flatnonzero(passes.fresh).tolist() == [0, 20, 40]
        assert passes.decode.all()
        assert Passes(random_trace(tmp_path / "b"), max_tokens=25).edges[-1] == 25

    def test_generated_text_is_a_prompt_and_single_tokens(self, tmp_path: Path) -> None:
        # step 0 reads both prompts, step 1 and 2 each one token of both sequences
        phases = ["prefill"] * 6 + ["decode"] * 2
        trace = make_trace(
            tmp_path,
            {0: [[i % 4, 4 + i % 2] for i in range(8)]},
            6,
            sequences=[0, 0, 0, 1, 1, 1, 0, 1],
            positions=[0, 1, 2, 0, 1, 2, 3, 3],
            phases=phases,
        )
        passes = Passes(trace)
        assert passes.by == "sequences"
        assert not passes.unrolled
        assert passes.rows.tolist() == [0, 1, 2, 6, 3, 4, 5, 7]
        assert np.diff(passes.edges).tolist() == [3, 1, 3, 1]
        assert passes.decode.tolist() == [False, True, False, True]
        assert passes.fresh.tolist() == [True, False, True, False]
        assert passes.step(0, 0).experts.tolist() == [0, 1, 2, 4, 5]
        assert passes.step(0, 0).counts.tolist() == [1, 1, 1, 2, 1]
        recorded = Passes(trace, by="recorded")
        assert np.diff(recorded.edges).tolist() == [6, 2]
        assert recorded.fresh.tolist() == [True, False]
        found = simulate(trace, settings_of(capacity=6), COST)
        assert (found.prompt_tokens, found.decode_tokens) == (6, 2)
        assert found.prompt_seconds > 0
        assert found.requests == 5 + 2 + 5 + 2

    def test_a_prompt_is_ordered_by_popularity_and_few_tokens_by_weight(self, tmp_path: Path) -> None:
        N = FEW + 1
        experts = np.array([[0, 1]] * 3 + [[2, 1]] * (N - 3))
        weights = np.array([[1.0, 0.0]] * 3 + [[0.03, 0.02]] * (N - 3))
        trace = make_trace(tmp_path, {0: experts}, 3, weights={0: weights})
        many = Passes(trace, by="recorded").step(0, 0)
        assert many.experts[many.order].tolist() == [1, 2, 0]
        few = Passes(trace, by="recorded", max_tokens=FEW).step(0, 0)
        assert few.experts[few.order].tolist() == [0, 2, 1]
        np.testing.assert_allclose(few.weights[0], 3.0)

    def test_a_prompt_reads_each_expert_once(self, tmp_path: Path) -> None:
        passes = Passes(random_trace(tmp_path), by="recorded")
        found = simulate(passes, settings_of(capacity=2), COST)  # one slot a layer
        distinct = sum(len(passes.step(n, layer).experts) for n in range(len(passes)) for layer in range(2))
        assert found.requests == distinct
        assert found.prompt_tokens == 60

    def test_tokens_without_experts_and_unused_slots(self, tmp_path: Path) -> None:
        trace = make_trace(tmp_path, {0: [[6, 6], [1, 6], [6, 6]], 1: [[0, 1], [2, 6], [6, 6]]}, 6)
        found = simulate(trace, settings_of(capacity=4), COST)
        assert found.found.sum(1).tolist() == [1, 3]
        assert found.log["expert"].tolist() == [0, 1, 1, 2]

    def test_probabilities_are_those_of_the_logits(self, tmp_path: Path) -> None:
        logits = np.random.default_rng(0).normal(size=(8, 4))
        trace = make_trace(tmp_path, {0: np.argsort(-logits, 1)[:, :2]}, 4, logits={0: logits})
        passes = Passes(trace, by="recorded", probabilities=True)
        expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(passes.probabilities(0, 0), expected.mean(0), atol=2e-3)
        assert Passes(trace).probabilities(0, 0) is None

    def test_bad_requests(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="at least 1"):
            Passes(random_trace(tmp_path / "a"), max_tokens=0)
        with pytest.raises(TraceError, match="no tokens"):
            Passes(make_trace(tmp_path / "b", {0: np.zeros((0, 1), int)}, 2))


class Half(PrecisionSettings):
    """The first expert of a token exactly, the second in the low copy, a third not at all."""

    def build(self, geometry: Geometry, bits: tuple[int, ...]) -> PrecisionPolicy:
        class Policy(PrecisionPolicy):
            def choose(self, choice: Choice) -> np.ndarray[Any, Any]:
                found = np.full(choice.experts.shape, SKIP, np.uint8)
                found[:, 0], found[:, 1] = self.bits[0], self.bits[1]
                return found

        return Policy(geometry, bits)


def test_copies_of_two_precisions_have_pools_of_their_own(tmp_path: Path) -> None:
    trace = random_trace(tmp_path, K=3)
    asked = settings_of(capacity=10, expert_bytes={16: 1000, 4: 250}, precision=Half())
    found = simulate(trace, asked, COST)
    assert found.found[:, Found.SKIP].tolist() == [60, 60]
    assert set(found.log["bits"].tolist()) == {16, 4}
    assert set(found.log["bytes"].tolist()) == {0, 1000, 250}
    assert found.capacity == 8  # a fifth of the bytes went to eight small copies
    assert found.optimal_hits is None
    assert found.distance is None
    with pytest.raises(ConfigError, match="too few for copies"):
        simulate(trace, settings_of(capacity=2, expert_bytes={16: 1000, 4: 250}, precision=Half()), COST)
    with pytest.raises(ConfigError, match="use one copy"):
        simulate(trace, settings_of("opt", 10, expert_bytes={16: 1000, 4: 250}, precision=Half()), COST)


def test_results_as_plain_data(tmp_path: Path) -> None:
    import json

    found: Simulation = simulate(random_trace(tmp_path), settings_of(capacity=6), COST)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert [layer["layer"] for layer in record["layers"]] == [0, 3]
    assert sum(layer["miss"] for layer in record["layers"]) == found.found[:, Found.MISS].sum()
    assert record["hit"] + record["miss"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"capacity": 0}, "0 slots"), ({"expert_bytes": {16: 0}}, "at least 1"), ({"low_share": 1.0}, "low_share")],
)
def test_settings_are_checked(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        settings_of(**change)


def test_a_predictor_gets_what_it_needs(tmp_path: Path) -> None:
    passes = Passes(random_trace(tmp_path))

    class Needy(Oracle):
        needs = frozenset({"gate_input"})

    with pytest.raises(ConfigError, match="routers' inputs"):
        simulate(passes, settings_of(), COST, predictor=Needy(passes))


class TestCost:
    def test_seconds(self) -> None:
        cost = COST.model_copy(update={"expert": {4: ((1, 2.0), (3, 4.0), (4, 8.0))}})
        assert [cost.expert_seconds(rows, 4, 500) for rows in (1, 2, 3, 4, 6)] == [2, 3, 4, 8, 16]
        assert cost.expert_seconds(7, 16, 500) == 0.5
        assert cost.read_seconds(500) == 1.5
        assert (cost.layer(3), cost.outside(3)) == (1, 10)

    def test_files(self, tmp_path: Path) -> None:
        cost = COST.model_copy(update={"expert": {4: ((1.0, 2.0),)}})
        cost.save(tmp_path / "cost.json")
        assert CostModel.load(tmp_path / "cost.json") == cost
        text = (tmp_path / "cost.json").read_text()
        for bad, match in (
            (text.replace("1000.0", "-1"), "read_bandwidth"),
            (text.replace("read_latency", "latency"), "latency"),
            ("[", "file"),
            (text.replace('"4":[[1.0', '"4":[[0.5').replace("1.0,\n", "0.5,\n"), "expert"),
        ):
            (tmp_path / "bad.json").write_text(bad)
            with pytest.raises(ConfigError, match=match):
                CostModel.load(tmp_path / "bad.json")
        with pytest.raises(ConfigError, match="could not read the cost model"):
            CostModel.load(tmp_path / "none.json")

    def test_measured(self, tmp_path: Path) -> None:
        cost = measure_cost(tmp_path, record=1 << 20, size=8 << 20)
        assert cost.read_bandwidth > 1e6
        assert 0 <= cost.read_latency < 1
        assert cost.memory_bandwidth > 1e8
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(StorageError, match="cannot measure"):
            measure_cost(tmp_path / "none")
