"""Cache policies against hand-worked examples, one another and the stack algorithm of `collegium measure`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from policy_drive import POLICIES, Drive, use

from collegium.errors import ConfigError
from collegium.offload.cache import ExpertCache, Found
from collegium.offload.cost import CostModel
from collegium.offload.geometry import Geometry
from collegium.offload.policies import find_policy
from collegium.offload.policies.base import even_quotas, shares
from collegium.offload.policies.edgemoe import distance
from collegium.offload.policies.hobbit import Hobbit
from collegium.offload.policies.hybrimoe import HybriMoE
from collegium.offload.simulate import SimulationSettings, simulate
from measure_traces import make_trace

COST = CostModel(read_bandwidth=1e9, read_latency=0, memory_bandwidth=1e10, measured="a test")
DEMAND = [name for name in POLICIES if not name.startswith("opt")]
ONE = Geometry(experts=(3,), top_k=(1,), layers=(0,))


def hits(name: str, geometry: Geometry, capacity: int, steps: list[tuple[int, list[int]]]) -> int:
    drive = Drive.of(name, geometry, capacity, steps)
    for layer, experts in steps:
        drive.step(layer, experts)
    return int((drive.log["found"] == Found.HIT).sum())


def random_steps(geometry: Geometry, tokens: int, seed: int) -> list[tuple[int, list[int]]]:
    """Tokens of a skewed router."""
    draw = np.random.default_rng(seed)
    steps = []
    for _ in range(tokens):
        for layer, (E, K) in enumerate(zip(geometry.experts, geometry.top_k, strict=True)):
            p = np.arange(E, 0, -1.0)
            steps.append((layer, draw.choice(E, K, replace=False, p=p / p.sum()).tolist()))
    return steps


def test_lru_misses_a_cycle_that_the_optimum_half_serves() -> None:
    steps = [(0, [expert]) for expert in (0, 1, 2, 0, 1, 2)]
    assert hits("lru", ONE, 2, steps) == 0
    assert hits("opt", ONE, 2, steps) == 2


@pytest.mark.parametrize("scope", ["layer", "global"])
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 17))
def test_nobody_who_loads_on_demand_beats_the_optimum(scope: str, seed: int, capacity: int) -> None:
    geometry = Geometry(experts=(6, 4, 8), top_k=(2, 1, 3), layers=(0, 1, 2))
    capacity = max(capacity, 9)  # a token's experts fit, so there are no waves, which no optimum is known for
    steps = random_steps(geometry, 25, seed)
    for name in ("lru", "lfu", "arc", "hybrimoe", "hobbit", "edgemoe", "moe_infinity"):
        assert hits(f"{name}:scope={scope}", geometry, capacity, steps) <= hits(
            f"opt:scope={scope}", geometry, capacity, steps
        )
    if scope == "global":
        for name in DEMAND:
            assert hits(name, geometry, capacity, steps) <= hits("opt:scope=global", geometry, capacity, steps)


@pytest.mark.parametrize("name", ["lru:scope=global", "opt:scope=global", "lru", "opt"])
def test_stack_policies_gain_from_every_slot(name: str) -> None:
    geometry = Geometry(experts=(8, 8), top_k=(2, 2), layers=(0, 1))
    steps = random_steps(geometry, 60, 5)
    found = [hits(name, geometry, capacity, steps) for capacity in range(4, 17)]
    assert found == sorted(found)
    distinct = len({(layer, expert) for layer, experts in steps for expert in experts})
    assert found[-1] == 60 * 4 - distinct


def test_lru_of_layers_is_the_stack_algorithm_of_measure(tmp_path: Path) -> None:
    from collegium.measure.cache import cache_curves

    draw = np.random.default_rng(3)
    N, E, K = 300, 9, 3
    experts = {layer: np.argsort(draw.random((N, E)) * np.arange(1, E + 1), axis=1)[:, :K] for layer in (0, 1)}
    weights = {layer: np.sort(draw.random((N, K)))[:, ::-1] for layer in experts}
    trace = make_trace(tmp_path, experts, E, weights=weights, sequences=np.arange(N) // 50)
    curves = cache_curves(trace, ratios=[1, 4 / 3, 2, 3])
    for at, capacity in enumerate(curves[0].capacity):
        settings = SimulationSettings(find_policy("lru"), int(capacity) * 2, {16: 1000})
        found = simulate(trace, settings, COST)
        rates = found.found[:, Found.HIT] / found.found.sum(1)
        np.testing.assert_allclose(rates, [curve.lru[at] for curve in curves], rtol=1e-12)


def test_the_weakest_expert_of_a_token_counts_as_used_first() -> None:
    steps = [(0, [2, 0]), (0, [1])]
    geometry = Geometry(experts=(3,), top_k=(2,), layers=(0,))
    drive = Drive.of("lru", geometry, 2, steps)
    for layer, experts in steps:
        drive.step(layer, experts)
    assert drive.log["evicted"].tolist() == [-1, -1, 0]


def test_lfu_forgets_at_its_half_life() -> None:
    geometry = Geometry(experts=(3,), top_k=(1,), layers=(0,))
    often = [(0, [0])] * 4 + [(0, [1])] * 2
    for half_life, leaves in (("inf", 1), ("0.5", 0)):
        steps = [*often, (0, [2])]
        drive = Drive.of(f"lfu:half_life={half_life}", geometry, 2, steps)
        for layer, experts in steps:
            drive.step(layer, experts)
        assert drive.log["evicted"][-1] == leaves
    policy: Any = find_policy("lfu:half_life=3").build(geometry, 2)
    for expert in (0, 1, 0, 2):
        policy.used(use(geometry, 0, [expert]))
    np.testing.assert_allclose(2 ** (policy.score - 3 / 3), [2**-1 + 2 ** (-1 / 3), 2 ** (-2 / 3), 1])


def test_edgemoe_distances() -> None:
    layers = np.array([2, 3, 0, 1])
    assert distance(layers, 1, 4).tolist() == [1, 2, 3, 4]
    assert distance(layers, 1, 4, printed=True).tolist() == [3, 2, 1, 4]
    geometry = Geometry(experts=(2,) * 4, top_k=(1,) * 4, layers=(0, 1, 2, 3))
    policy = find_policy("edgemoe").build(geometry, 4)
    for layer in (1, 2, 3, 0):  # equal frequency; layer 1 runs now
        policy.used(use(geometry, layer, [0]))
    assert policy.victim(np.array([0, 2, 4, 6]), 3) == 2


def test_mrs_by_hand() -> None:
    geometry = Geometry(experts=(4,), top_k=(1,), layers=(0,))
    policy: Any = HybriMoE(a=0.5, p=2).build(geometry, 2)
    policy.used(use(geometry, 0, [0], probabilities=[0.5, 0.3, 0.15, 0.05]))
    policy.used(use(geometry, 0, [2], probabilities=[0.1, 0.2, 0.6, 0.1]))
    np.testing.assert_allclose(policy.score, [0.125, 0.175, 0.3, 0.0], rtol=1e-6)
    bare: Any = HybriMoE().build(geometry, 2)
    bare.used(use(geometry, 0, [3], weights=[0.75]))
    np.testing.assert_allclose(bare.score, [0, 0, 0, 0.375])


def test_mrs_that_takes_only_the_newest_keeps_the_last_experts() -> None:
    geometry = Geometry(experts=(6,), top_k=(2,), layers=(0,))
    policy: Any = HybriMoE(a=1, p=1).build(geometry, 4)
    for probabilities in np.random.default_rng(0).dirichlet(np.ones(6), 5):
        top = np.argsort(-probabilities)[:2]
        policy.used(use(geometry, 0, top.tolist(), probabilities=probabilities.tolist()))
    assert set(np.flatnonzero(policy.score)) == set(top.tolist())


def test_hobbit_by_hand() -> None:
    geometry = Geometry(experts=(2, 2), top_k=(1, 1), layers=(0, 1))
    policy: Any = Hobbit(w1=0.4, w2=0.3, w3=0.2, w4=0.1, scope="global").build(geometry, 2)
    for expert, exact in ((0, True), (1, False), (0, False), (0, True)):
        policy.used(use(geometry, 0, [expert], exact=[exact]))
        policy.used(use(geometry, 1, [1]))
    # four tokens; layer 0 runs now. Expert 0 of layer 0: R 4, F 3, H 2; expert 1: R 2, F 1, H 0; of layer 1, F 4
    worth = policy.worth(np.arange(4), 0)
    last = [0.4 + 0.3 * 3 / 4 + 0.2 * 2 / 4 + 0.1, 0.4 * 2 / 4 + 0.3 / 4 + 0.1, 0.05, 0.4 + 0.3 + 0.2 + 0.05]
    np.testing.assert_allclose(worth, last)
    policy.begin()
    np.testing.assert_allclose(policy.worth(np.arange(4), 0), [0.1, 0.1, 0.05, 0.05])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["layer", "global"]))
def test_hobbit_of_recency_alone_is_lru(seed: int, scope: str) -> None:
    geometry = Geometry(experts=(7, 5), top_k=(1, 1), layers=(0, 1))
    steps = random_steps(geometry, 60, seed)
    weights = "w1=1,w2=0,w3=0,w4=0"
    for name in (f"lru:scope={scope}", f"hobbit:{weights},scope={scope}"):
        drive = Drive.of(name, geometry, 6, steps)
        for layer, experts in steps:
            drive.step(layer, experts)
        evicted = drive.log["evicted"].copy()
        if name.startswith("lru"):
            expected = evicted
    if scope == "layer":
        np.testing.assert_array_equal(evicted, expected)
    else:  # tokens, not steps, are its clock: experts of one token are equally old, and their last use decides
        assert (evicted >= 0).sum() == (expected >= 0).sum()


def test_arc_learns_to_keep_what_is_used_twice() -> None:
    geometry = Geometry(experts=(12,), top_k=(1,), layers=(0,))
    loop = [(0, [0]), (0, [1])] * 3
    scan = [(0, [expert]) for expert in range(2, 12)]
    steps = [*loop, *scan, (0, [0]), (0, [1])]
    assert hits("arc", geometry, 4, steps) == 4 + 2  # the scan passes through the list of what was used once
    assert hits("lru", geometry, 4, steps) == 4


@settings(max_examples=30, deadline=None)
@example([0, 0, 1, 2, 3, 1, 0], 2)  # the new expert takes the place of the oldest name in B1
@given(st.lists(st.integers(0, 7), min_size=1, max_size=80), st.integers(1, 6))
def test_arc_of_one_expert_a_token_is_the_published_algorithm(requests: list[int], capacity: int) -> None:
    geometry = Geometry(experts=(8,), top_k=(1,), layers=(0,))
    steps = [(0, [expert]) for expert in requests]
    drive = Drive.of("arc", geometry, capacity, steps)
    for layer, experts in steps:
        drive.step(layer, experts)
    assert (drive.log["found"] == Found.HIT).tolist() == arc_by_the_book(requests, capacity)


def arc_by_the_book(requests: list[int], c: int) -> list[bool]:
    """Megiddo and Modha's listing, cases I to IV; lists have their most recent entry at the end."""
    t1, t2, b1, b2 = [], [], [], []  # type: ignore[var-annotated]
    p = 0.0
    found = []

    def replace(in_b2: bool) -> None:
        if t1 and (len(t1) > p or (in_b2 and len(t1) == p)):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for x in requests:
        found.append(x in t1 or x in t2)
        if x in t1 or x in t2:
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
        elif x in b1:
            p = min(float(c), p + max(1.0, len(b2) / len(b1)))
            if len(t1) + len(t2) == c:
                replace(False)
            b1.remove(x)
            t2.append(x)
        elif x in b2:
            p = max(0.0, p - max(1.0, len(b1) / len(b2)))
            if len(t1) + len(t2) == c:
                replace(True)
            b2.remove(x)
            t2.append(x)
        else:
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    b1.pop(0)
                    if len(t1) + len(t2) == c:
                        replace(False)
                else:
                    t1.pop(0)
            elif len(t1) + len(t2) + len(b1) + len(b2) >= c:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * c:
                    b2.pop(0)
                if len(t1) + len(t2) == c:
                    replace(False)
            t1.append(x)
    return found


def test_fate_holds_its_first_layers_whole() -> None:
    geometry = Geometry(experts=(8, 8, 8, 8), top_k=(2, 2, 2, 2), layers=(0, 1, 2, 3))
    for capacity, shallow, quotas in ((17, 1, [8, 3, 3, 3]), (20, 2, [8, 8, 2, 2]), (13, 2, [4, 3, 3, 3])):
        policy = find_policy(f"fate:shallow={shallow}").build(geometry, capacity)
        assert policy.quotas() is not None
        assert policy.quotas().tolist() == quotas  # type: ignore[union-attr]


def test_expertflow_gives_slots_to_layers_of_many_experts_and_drops_wrong_predictions() -> None:
    geometry = Geometry(experts=(8, 8), top_k=(2, 2), layers=(0, 1))
    policy: Any = find_policy("expertflow:window=4").build(geometry, 8)
    draw = np.random.default_rng(0)
    for _ in range(6):  # layer 0 always uses the same two, layer 1 any
        policy.used(use(geometry, 0, [0, 1]))
        policy.used(use(geometry, 1, draw.choice(8, 2, replace=False).tolist()))
    assert policy.quotas()[0] == 2
    assert policy.quotas()[1] == 6
    scores = np.zeros(8)
    scores[[3, 5]] = 1
    policy.expect(1, scores)
    keys = np.arange(8, 16)
    assert policy.victim(keys, 8) not in (8 + 3, 8 + 5)
    policy.used(use(geometry, 1, [3, 0]))
    assert policy.victim(keys, 8) == 8 + 5


def test_moe_infinity_keeps_what_a_request_like_this_one_used() -> None:
    geometry = Geometry(experts=(4, 4), top_k=(1, 1), layers=(0, 1))
    policy: Any = find_policy("moe_infinity:past=3,scope=layer").build(geometry, 4)
    for request in ([0, 1], [2, 3], [0, 1]):  # three requests, of two kinds
        policy.begin()
        for _ in range(4):
            policy.used(use(geometry, 0, [request[0]]))
            policy.used(use(geometry, 1, [request[1]]))
    policy.begin()
    policy.used(use(geometry, 0, [2]))
    policy.used(use(geometry, 1, [3]))
    # this one has begun like the second: what the first and third used leaves, though it was used more often
    assert policy.victim(np.array([0, 2]), 1) == 0
    policy.used(use(geometry, 0, [2]))
    assert policy.victim(np.array([4 + 1, 4 + 3]), 4) == 4 + 1


def test_shares_are_in_proportion_within_bounds() -> None:
    geometry = Geometry(experts=(8, 8, 8), top_k=(2, 2, 2), layers=(0, 1, 2))
    assert even_quotas(geometry, 11).tolist() == [4, 4, 3]
    least = np.full(3, 2)
    assert shares(np.array([1, 2, 3]), least, geometry, 12).tolist() == [2, 4, 6]
    assert shares(np.array([1, 100, 1]), least, geometry, 12).tolist() == [2, 8, 2]
    for capacity, demand in itertools.product(range(6, 30), ([1, 1, 1], [5, 1, 2], [1, 9, 9])):
        found = shares(np.array(demand), least, geometry, capacity)
        assert found.sum() == min(capacity, 24)
        assert found.min() >= 2
        assert found.max() <= 8
    with pytest.raises(ConfigError, match="fewer than the 6"):
        shares(np.ones(3), least, geometry, 5)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("nothing", "no cache is named 'nothing'"),
        ("lru:window=1", "no setting 'window'; there are scope"),
        ("lru:scope=token", "scope"),
        ("lfu:half_life=many", "half_life"),
        ("hobbit:w1", "key=value"),
    ],
)
def test_policies_by_name(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        find_policy(text)


@pytest.mark.parametrize(
    "text",
    ["lfu:half_life=0", "lfu:half_life=nan", "hybrimoe:a=0", "hybrimoe:p=0.5", "hobbit:w1=-1", "hobbit:w1=nan",
     "hobbit:w1=0,w2=0,w3=0,w4=0", "fate:shallow=-1", "expertflow:window=0", "moe_infinity:past=-1"],
)  # fmt: skip
def test_settings_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        find_policy(text).build(ONE, 3)


def test_a_cache_says_what_its_policy_is_made_for() -> None:
    policy = find_policy("lru:scope=global").build(ONE, 3)
    assert ExpertCache(ONE, 3, policy).policy is policy
