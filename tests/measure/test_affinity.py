"""Transitions between layers and pairs within one, against tables that can be counted by hand."""

from __future__ import annotations

import warnings
from itertools import combinations
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collegium.measure.affinity import coactivation, inter_layer_affinity
from collegium.measure.information import means, mutual_information
from measure_traces import make_trace


def test_transitions_counted_by_hand(tmp_path: Path) -> None:
    (found,) = inter_layer_affinity(make_trace(tmp_path / "t", {1: [[0], [0], [1], [1]], 3: [[2], [2], [0], [1]]}, 3))
    assert (found.layer, found.next_layer) == (1, 3)
    assert found.transition.tolist() == [[0, 0, 1], [0.5, 0.5, 0], [0, 0, 0]]
    assert found.information.value == pytest.approx(1)  # the next expert names this one, which is a fair coin
    assert found.concentration.value == pytest.approx(0.75)
    assert found.even == pytest.approx(1 / 3)


def test_all_pairs_of_a_token_count_once(tmp_path: Path) -> None:
    (found,) = inter_layer_affinity(make_trace(tmp_path / "t", {0: [[0, 1]], 1: [[1, 2]]}, 3))
    assert found.transition.tolist() == [[0, 0.5, 0.5], [0, 0.5, 0.5], [0, 0, 0]]
    assert found.information.value == 0
    assert found.control == 0
    assert found.concentration.value == pytest.approx(1)  # two successors, K' = 2


def test_ragged_tokens_and_layers_of_other_sizes(tmp_path: Path) -> None:
    experts = {0: [[0, 1], [2, 3], [0, 3]], 1: [[5, 6, 6], [6, 6, 6], [0, 1, 5]]}  # 3 and 6 are unused slots
    trace = make_trace(tmp_path / "t", experts, {0: 3, 1: 6})
    (found,) = inter_layer_affinity(trace)
    assert found.transition.shape == (3, 6)
    # token 0: 0-5, 1-5; token 1: none; token 2: 0-0, 0-1, 0-5
    assert found.transition[0].tolist() == [0.25, 0.25, 0, 0, 0, 0.5]
    assert found.transition[1].tolist() == [0, 0, 0, 0, 0, 1]
    assert found.transition[2].tolist() == [0] * 6


def test_structure_beats_the_control_and_independence_does_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 8, (2000, 1))
    loose = np.where(rng.random((2000, 1)) < 0.7, first * 3 % 8, rng.integers(0, 8, (2000, 1)))
    trace = make_trace(
        tmp_path / "t", {0: first, 1: loose, 2: rng.integers(0, 8, (2000, 1))}, 8, sequences=np.arange(2000) // 50
    )
    tied, free = inter_layer_affinity(trace)
    assert tied.information.low > 10 * tied.control
    assert tied.information.low < tied.information.value < tied.information.high
    assert tied.concentration.value == pytest.approx(0.7 + 0.3 / 8, abs=0.03)
    assert tied.concentration_control < 0.25
    # 49 degrees of freedom, 2000 pairs: (E - 1)^2 / (2 N ln 2) bits by chance
    assert free.control == pytest.approx(49 / (4000 * np.log(2)), rel=0.5)
    assert free.information.value < 2 * free.control


def test_no_pair_of_layers_and_no_experts(tmp_path: Path) -> None:
    assert inter_layer_affinity(make_trace(tmp_path / "one", {0: [[0]]}, 2)) == []
    (found,) = inter_layer_affinity(make_trace(tmp_path / "none", {0: [[2]], 1: [[2]]}, 2, top_k=1))
    assert not found.transition.any()
    assert found.control == 0
    assert np.isnan(found.information.value)  # no pair, no number


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_names_of_experts_do_not_matter(tmp_path: Path, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    E, F, N = 5, 7, 40
    first = np.stack([rng.permutation(E)[:2] for _ in range(N)])
    second = np.stack([rng.permutation(F)[:3] for _ in range(N)])
    rename, rename_next = rng.permutation(E), rng.permutation(F)
    base = tmp_path / uuid4().hex
    documents = np.arange(N) // 8
    (plain,) = inter_layer_affinity(make_trace(base / "a", {0: first, 1: second}, {0: E, 1: F}, sequences=documents))
    (named,) = inter_layer_affinity(
        make_trace(base / "b", {0: rename[first], 1: rename_next[second]}, {0: E, 1: F}, sequences=documents)
    )
    assert np.allclose(named.transition[rename][:, rename_next], plain.transition)
    assert named.information.value == pytest.approx(plain.information.value)
    assert named.information.low == pytest.approx(plain.information.low)
    assert named.concentration.value == pytest.approx(plain.concentration.value)
    joint = np.zeros((E, F))
    for a, b in zip(first, second, strict=True):
        joint[np.ix_(a, b)] += 1
    assert plain.information.value == pytest.approx(mutual_information(joint))


def test_means_leave_out_blocks_without_weight() -> None:
    found = means(np.array([[2.0, 4.0], [0.0, 0.0], [1.0, 4.0]]))[0]
    assert found.value == pytest.approx(3 / 8)
    assert found.low <= found.value <= found.high
    assert np.isnan(means(np.zeros((4, 2)))[0].value)


def test_pairs_counted_by_hand(tmp_path: Path) -> None:
    (found,) = coactivation(make_trace(tmp_path / "t", {4: [[0, 1], [1, 0], [2, 3], [3, 4]]}, 4, top_k=2))
    assert found.layer == 4
    assert found.counts.tolist() == [[0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]  # 4 is an unused slot
    assert found.lift[0, 1] > 1
    assert found.lift[0, 2] == 0


def test_every_pair_once_is_independence(tmp_path: Path) -> None:
    pairs = list(combinations(range(5), 2))
    (found,) = coactivation(make_trace(tmp_path / "t", {0: pairs}, 5))
    assert np.allclose(found.lift, 1 - np.eye(5))
    assert found.strongest == ()
    assert found.summary()["clearest pair"] is None


def test_popular_experts_do_not_look_like_friends(tmp_path: Path) -> None:
    """Everyone's expert 0 meets the others as often as they are met."""
    rng = np.random.default_rng(0)
    other = rng.integers(1, 8, 3000)
    (found,) = coactivation(make_trace(tmp_path / "t", {0: np.stack([other * 0, other], 1)}, 8, part_rows=4096))
    assert np.allclose(found.lift[0, 1:], 1, atol=0.1)
    assert found.strongest == ()


def test_a_planted_pair_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(8)[:2] for _ in range(2000)])
    experts[rng.random(2000) < 0.1] = 2, 5
    (found,) = coactivation(make_trace(tmp_path / "t", {0: experts}, 8, part_rows=4096))
    assert found.strongest[0][:2] == (2, 5)
    assert found.strongest[0][2] > 2
    assert found.summary()["clearest pair"] == "2 + 5"


def test_one_expert_a_token_has_no_pairs(tmp_path: Path) -> None:
    (found,) = coactivation(make_trace(tmp_path / "t", {0: [[0], [1], [1]]}, 3))
    assert not found.counts.any()
    assert not found.lift.any()
    assert found.strongest == ()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 30), st.integers(0, 1 << 30))
def test_any_layer_has_a_finite_lift(tmp_path: Path, E: int, K: int, N: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(E + K)[:K].clip(max=E) for _ in range(N)])  # ids from E on: unused slots
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = coactivation(make_trace(tmp_path / uuid4().hex, {0: experts}, E))
    assert np.isfinite(found.lift).all()
    assert (found.lift > 0)[found.counts > 0].all()
    assert np.array_equal(found.counts, found.counts.T)
    used = np.where(experts < E, 1, 0).sum(1)
    assert found.counts.sum() == (used * (used - 1)).sum()
