"""Precision policies: neutral settings, the thresholds of HOBBIT, popularity, and tables and how they are fitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.catalog import methods
from collegium.errors import ConfigError, PlanError
from collegium.experts.weights import ExpertWeights
from collegium.offload.geometry import Array, Geometry
from collegium.offload.precision import find_precision
from collegium.offload.precision.base import SKIP, Choice
from collegium.offload.precision.fit_table import fit_table, measured_sensitivity, weight_sensitivity
from collegium.offload.precision.hobbit import Hobbit, unimportance
from collegium.offload.precision.popularity import Popularity
from collegium.offload.precision.table import PrecisionPlan, Table
from measure_traces import make_trace

E, K = 6, 4
GEOMETRY = Geometry((E, E), (K, K), (0, 3))
BITS = (16, 8, 4)


def plan_file(folder: Path, **changes: Any) -> str:
    body = {
        "model": "m", "fingerprint": "abc", "created": "now", "collegium": "0",
        "layers": [{"layer": 0, "bits": [16, 8, 8, 16, 16, 16]}, {"layer": 3, "bits": [8] * 6}],
    } | changes  # fmt: skip
    path = folder / "plan.json"
    path.write_text(json.dumps(body))
    return str(path)


def choice(weights: Any, experts: Any = None, resident: Any = (), decode: bool = True, layer: int = 0) -> Choice:
    w = np.atleast_2d(np.asarray(weights, np.float32))
    ids = np.tile(np.arange(w.shape[1]), (len(w), 1)) if experts is None else np.atleast_2d(experts)
    return Choice(layer, ids, w, np.isin(np.arange(E), list(resident)), decode)


@st.composite
def choices(draw: Any) -> Choice:
    T = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    experts = np.stack([rng.permutation(E + 1)[:K] for _ in range(T)])  # E is an unused slot
    weights = np.where(experts < E, rng.random((T, K)) ** 3, 0).astype(np.float32)
    resident = draw(st.sets(st.integers(0, E - 1)))
    return choice(weights, experts, resident, draw(st.booleans()), draw(st.integers(0, 1)))


def test_hobbit_vector() -> None:
    policy = Hobbit(0.6, 0.9).build(GEOMETRY, BITS)
    assert policy.used_bits == (16, 4)
    np.testing.assert_allclose(
        unimportance(np.array([[0.5, 0.3, 0.15, 0.05]]), np.ones((1, 4), bool)), [[0, 0.5, 0.8, 0.95]]
    )
    w = np.array([0.5, 0.3, 0.15, 0.05])
    assert policy.choose(choice(w)).tolist() == [[16, 16, 4, SKIP]]
    assert policy.choose(choice(w[::-1] * 7)).tolist() == [[SKIP, 4, 16, 16]]  # normalised, in any order
    assert policy.choose(choice(w, resident={3})).tolist() == [[16, 16, 4, 16]]  # what is there is used
    assert policy.choose(choice(w, decode=False)).tolist() == [[16] * 4]
    assert Hobbit(0.6, 0.9, low=8).build(GEOMETRY, BITS).choose(choice(w)).tolist() == [[16, 16, 8, SKIP]]
    firm = Hobbit(0.6, 0.9, deterministic=True).build(GEOMETRY, BITS)
    assert firm.choose(choice(w, resident={2, 3})).tolist() == [[16, 16, 4, SKIP]]
    only_skips = Hobbit(0.6, 0.6).build(GEOMETRY, (16,))
    assert only_skips.used_bits == (16,)
    assert only_skips.choose(choice(w)).tolist() == [[16, 16, SKIP, SKIP]]


@pytest.mark.parametrize("name", ["fixed", "hobbit:t1=1,t2=1", "popularity:share=0", "table"])
@settings(max_examples=60, deadline=None)
@given(one=choices(), copies=st.sampled_from([(16,), BITS, (8, 4)]))
def test_neutral_settings_give_the_high_copy(
    name: str, one: Choice, copies: tuple[int, ...], tmp_path_factory: Any
) -> None:
    if name == "table":
        layers = [{"layer": layer, "bits": [copies[0]] * E} for layer in GEOMETRY.layers]
        name = f"table:plan={plan_file(tmp_path_factory.mktemp('plan'), layers=layers)}"
    policy = find_precision(name).build(GEOMETRY, copies)
    assert policy.used_bits == copies[:1]
    assert policy.constant
    assert (policy.choose(one) == copies[0]).all()


@pytest.mark.parametrize("name", ["fixed:bits=8", "hobbit", "popularity", "table"])
@settings(max_examples=60, deadline=None)
@given(one=choices())
def test_contract(name: str, one: Choice, tmp_path_factory: Any) -> None:
    if name == "table":
        name = f"table:plan={plan_file(tmp_path_factory.mktemp('plan'))}"
    policy = find_precision(name).build(GEOMETRY, BITS)
    found = policy.choose(one)
    assert found.shape == one.experts.shape
    assert found.dtype == np.uint8
    assert set(found.ravel().tolist()) <= {*policy.used_bits, SKIP}
    assert list(policy.used_bits) == sorted(policy.used_bits, reverse=True) == list(policy.bits)
    np.testing.assert_array_equal(found, policy.choose(one))
    ahead = policy.ahead(one.layer)
    assert ahead.shape == (E,)
    assert set(ahead.tolist()) <= set(policy.used_bits)
    if name.startswith(("table", "fixed")):  # which do not depend on the token
        used = one.experts < E
        np.testing.assert_array_equal(ahead[one.experts[used]], found[used])
    else:
        assert (ahead == policy.bits[0]).all()


def test_every_member_is_tested_here() -> None:
    assert {one.name for one in methods("precision")} == {"fixed", "hobbit", "popularity", "table"}


@settings(max_examples=60, deadline=None)
@given(one=choices(), ts=st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_hobbit_is_monotone(one: Choice, ts: list[float]) -> None:
    """A higher threshold never gives an assignment a less exact copy; the first of a token always has the high one."""
    a, b, t2 = sorted(ts)
    low, high = (Hobbit(t1, t2).build(GEOMETRY, BITS).choose(one).astype(int) for t1 in (a, b))
    assert (high >= low).all()
    more = Hobbit(a, b).build(GEOMETRY, BITS).choose(one).astype(int)
    assert (low >= more).all()
    first = np.where(one.experts < E, one.weights, -1).argmax(1)
    assert (low[np.arange(len(low)), first] == 16).all()


@settings(max_examples=60, deadline=None)
@given(one=choices(), other=st.sets(st.integers(0, E - 1)))
def test_deterministic_hobbit_does_not_look_at_memory(one: Choice, other: set[int]) -> None:
    policy = Hobbit(0.3, 0.7, deterministic=True).build(GEOMETRY, BITS)
    elsewhere = Choice(one.layer, one.experts, one.weights, np.isin(np.arange(E), list(other)), one.decode)
    np.testing.assert_array_equal(policy.choose(one), policy.choose(elsewhere))


def test_thresholds_from_a_trace(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    N = 500
    experts = np.stack([rng.permutation(E)[:K] for _ in range(N)])
    experts[::7, 3] = E
    w = rng.dirichlet(np.ones(K), N) * 2.5  # not normalised
    trace = make_trace(tmp_path / "t", {0: experts, 3: experts[::-1]}, E, weights={0: w, 3: w[::-1]}, top_k=K)
    settings = Hobbit.of_trace(trace, (0.67, 0.30), deterministic=True)
    chosen = settings.build(GEOMETRY, BITS).choose(choice(np.float16(w), experts))
    shares = [(chosen[experts < E] == bits).mean() for bits in (16, 4, SKIP)]
    np.testing.assert_allclose(shares, [0.67, 0.30, 0.03], atol=0.01)
    assert Hobbit.of_trace(trace, (1.0, 0.0)).t1 < 1
    everything = Hobbit.of_trace(trace, (1.0, 0.0), deterministic=True).build(GEOMETRY, BITS)
    assert (everything.choose(choice(np.float16(w), experts)) == 16).all()
    with pytest.raises(ConfigError, match="shares"):
        Hobbit.of_trace(trace, (0.9, 0.2))


def test_popularity() -> None:
    experts = np.array([[0, 1], [0, 1], [0, 2], [0, 3], [4, E]])
    one = choice(np.ones((5, 2)), experts, decode=False)
    half = Popularity(0.5).build(GEOMETRY, BITS)
    assert half.choose(one).tolist() == [[16, 16], [16, 16], [16, 4], [16, 4], [16, 16]]  # 2 of 5: the lowest ids
    assert half.used_bits == (16, 4)
    assert (Popularity(1.0, low=8).build(GEOMETRY, BITS).choose(one)[experts < E] == 8).all()
    assert (half.choose(choice(np.ones((5, 2)), experts, decode=True)) == 16).all()
    assert (Popularity().build(GEOMETRY, BITS).choose(choice(np.ones((1, 3)), decode=False)) == 16).all()


def test_settings_that_cannot_be() -> None:
    for one in (Hobbit(), Popularity(), Hobbit(low=2), Popularity(low=16)):
        with pytest.raises(ConfigError, match="Pack the model with two"):
            one.build(GEOMETRY, (16,) if one.low is None else BITS)
    for text in ("hobbit:t1=0.9,t2=0.5", "hobbit:t1=-1", "popularity:share=2", "fixed:bits=x", "hobbit:t3=1", "table"):
        with pytest.raises(ConfigError):
            find_precision(text)
    with pytest.raises(ConfigError, match="no copy of 5 bits"):
        find_precision("fixed:bits=5").build(GEOMETRY, BITS)


# ---- tables ------------------------------------------------------------------------------------------------------


def test_table(tmp_path: Path) -> None:
    policy = Table(plan_file(tmp_path)).build(GEOMETRY, BITS)
    assert policy.used_bits == (16, 8)
    experts = np.array([[0, 1, 2, E]])
    assert policy.choose(choice(np.ones(4), experts)).tolist() == [[16, 8, 8, 16]]
    assert policy.choose(choice(np.ones(4), experts, layer=1)).tolist() == [[8, 8, 8, 16]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "shrink"}, "field 'kind'"),
        ({"schema_version": 2}, "field 'schema_version'"),
        ({"layers": []}, "field 'layers'"),
        ({"layers": [{"layer": 0, "bits": [7] * E}]}, "bits"),
        ({"layers": [{"layer": 3, "bits": [8] * E}, {"layer": 0, "bits": [8] * E}]}, "ascend"),
        ({"layers": [{"layer": 0, "bits": [8] * E}]}, "layer 3 has no experts in the plan and 6 in the model"),
        ({"layers": [{"layer": 0, "bits": [8] * E}, {"layer": 3, "bits": [8]}]}, "layer 3 has 1 experts"),
        ({"loss": "NaN"}, "field 'loss'"),
        ({"extra": 1}, "field 'extra'"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Table(plan_file(tmp_path, **changes)).build(GEOMETRY, BITS)


def test_a_plan_of_another_model_or_copies_is_refused(tmp_path: Path) -> None:
    path = plan_file(tmp_path)
    Table(path, fingerprint="abc").build(GEOMETRY, BITS)
    with pytest.raises(PlanError, match="make a new plan"):
        Table(path, fingerprint="xyz").build(GEOMETRY, BITS)
    with pytest.raises(ConfigError, match="asks for copies of 8 bits"):
        Table(path).build(GEOMETRY, (16, 4))
    with pytest.raises(PlanError, match="could not read"):
        Table(str(tmp_path / "none.json")).build(GEOMETRY, BITS)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(PlanError, match="field 'file'"):
        PrecisionPlan.load(tmp_path / "broken.json")


def losses(costs: dict[int, Array], seen: list[Array]) -> Any:
    """1 and the cost of each expert's bits."""

    def evaluate(bits: Array) -> float:
        seen.append(bits)
        return 1 + float(sum(costs[int(width)][key] for key, width in enumerate(bits)))

    return evaluate


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 12), st.floats(0, 0.5))
def test_bisection_finds_what_a_linear_search_does(seed: int, n: int, tolerated: float) -> None:
    rng = np.random.default_rng(seed)
    lost = rng.random(n) / n
    costs = {16: 0 * lost, 8: lost / 10, 4: lost}
    seen: list[Array] = []
    sensitivity = rng.random(n)
    found = fit_table(sensitivity, BITS, losses(costs, seen), tolerated)
    assert found.evaluations == len(seen) <= 3 + int(np.ceil(np.log2(max(n, 2))))
    order = np.argsort(sensitivity, kind="stable")
    best, best_loss = np.full(n, 16), 1.0
    for high, low in ((16, 8), (8, 4)):
        for count in range(n + 1):
            bits = np.full(n, high)
            bits[order[:count]] = low
            loss = losses(costs, [])(bits)
            if loss <= 1 + tolerated:
                best, best_loss = bits, loss
    np.testing.assert_array_equal(found.bits, best)
    assert (found.reference, found.loss) == (1, pytest.approx(best_loss))


def test_least_sensitive_first_and_the_plan_it_makes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lost = rng.random(2 * E)
    costs = {16: 0 * lost, 4: lost}
    evaluate = losses(costs, [])
    sensitivity = measured_sensitivity(2 * E, 16, 4, evaluate)
    np.testing.assert_allclose(sensitivity, lost)
    found = fit_table(sensitivity, (16, 4), evaluate, tolerated=0.3)
    worst = fit_table(-sensitivity, (16, 4), evaluate, tolerated=0.3)
    assert found.lowered > worst.lowered
    assert set(np.flatnonzero(found.bits == 4)) == set(np.argsort(lost)[: found.lowered])
    plan = found.plan(GEOMETRY, model="m", fingerprint=None, settings={"tolerated": 0.3})
    plan.save(tmp_path / "p.json")
    assert PrecisionPlan.load(tmp_path / "p.json") == plan
    policy = find_precision(f"table:plan={tmp_path / 'p.json'}").build(GEOMETRY, (16, 4))
    ids = np.arange(E)[None]
    got = [policy.choose(choice(np.ones(E), ids, layer=layer))[0] for layer in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(got), found.bits)


def test_fit_table_refuses_nonsense() -> None:
    for sensitivity, bits, tolerated in (
        ([], (16, 8), 0.1),
        ([np.nan], (16, 8), 0.1),
        ([1.0], (8, 16), 0.1),
        ([1.0], (16,), -1),
    ):
        with pytest.raises(ConfigError):
            fit_table(np.array(sensitivity), bits, lambda bits: 1.0, tolerated)
    alone = fit_table(np.array([1.0]), (16,), lambda bits: 1.0)
    assert (alone.bits.tolist(), alone.lowered, alone.evaluations) == ([16], 0, 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_weight_sensitivity(transposed: bool) -> None:
    """Weights on the grid lose nothing, others something, and twice the use is twice the sensitivity."""
    torch.manual_seed(0)
    up, down = torch.randn(3, 8, 32), torch.randn(3, 32, 32)
    up[0], down[0] = torch.randint(-7, 8, (8, 32)).float(), torch.randint(-7, 8, (32, 32)).float()
    up[0, :, 0] = down[0, :, 0] = 7
    up[2], down[2] = up[1], down[1]
    if transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    weights = ExpertWeights(up, down, torch.nn.functional.silu, gated=False, transposed=transposed)
    found = weight_sensitivity([weights], [np.array([5, 1, 2])], 4, group=32)
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[2] == pytest.approx(2 * found[1])
    assert 1e-3 < found[1] * 8 < 1e-1
