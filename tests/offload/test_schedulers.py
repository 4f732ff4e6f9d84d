"""Schedulers: orders, HybriMoE's two processors, and ExpertFlow's regrouping of sequences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import ConfigError
from collegium.offload.schedule.hybrimoe import Hybrid
from collegium.offload.schedule.popularity import popularity
from collegium.offload.schedule.regroup import regroup
from collegium.offload.schedule.resident_first import resident_first

COST = Hybrid(fast=0.5, slow=1.0, slow_start=0.79, transfer=0.418)
TIMES = st.floats(0, 5, allow_nan=False)


def test_resident_experts_go_first_and_then_the_heavy_or_the_popular() -> None:
    resident = np.array([False, True, False, True, False])
    assert resident_first(resident, np.array([0.1, 0.2, 0.4, 0.3, 0.4])).tolist() == [3, 1, 2, 4, 0]
    assert popularity(resident, np.array([9, 1, 2, 1, 5])).tolist() == [1, 3, 0, 4, 2]


def test_two_processors_by_hand() -> None:
    found = COST.schedule(np.array([True, True, False, False]), np.array([5, 1, 4, 1]))
    assert (found.fast, found.slow, found.moved) == ((0, 1, 2), (3,), (2,))
    assert found.fast_seconds == pytest.approx(1.5)
    assert found.slow_seconds == found.makespan == pytest.approx(1.79)
    found = COST.schedule(np.array([False, False]), np.array([4, 1]))
    assert (found.fast, found.slow) == ((0, 1), ())
    assert found.makespan == pytest.approx(1.418)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=9),
    st.tuples(TIMES, TIMES, TIMES, TIMES),
)
def test_two_processors_are_never_worse_than_one(step: list[tuple[bool, int]], times: tuple[float, ...]) -> None:
    cost = Hybrid(*times)
    resident = np.array([there for there, _ in step], np.bool_)
    counts = np.array([count for _, count in step], np.int64)
    found = cost.schedule(resident, counts)
    assert sorted(found.fast + found.slow) == list(range(len(step)))
    assert set(found.moved) == {place for place in found.fast if not resident[place]}
    assert found.makespan <= min(cost.all_fast(resident), cost.all_slow(counts)) + 1e-9
    # the fast one's time, gone through again from its order alone
    link = done = 0.0
    for place in found.fast:
        link += 0.0 if resident[place] else cost.transfer
        done = max(done, 0.0 if resident[place] else link) + cost.fast
    assert found.fast_seconds == pytest.approx(done)


def test_times_of_a_schedule_are_checked() -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        Hybrid(fast=-1, slow=1, slow_start=0, transfer=0)


@given(st.integers(0, 8), st.integers(0, 1000))
def test_regrouping_is_a_permutation_that_is_never_less_alike(half: int, seed: int) -> None:
    paths = np.random.default_rng(seed).random((2 * half, 12)) < 0.3
    order = regroup(paths, seed)
    assert sorted(order.tolist()) == list(range(2 * half))
    assert order.tolist() == regroup(paths, seed).tolist()
    for batch in (order[:half], order[half:]):
        assert batch.tolist() == sorted(batch.tolist())
    assert alike(paths[order]) >= alike(paths)


def alike(paths: np.ndarray) -> int:
    half = len(paths) // 2
    pairs = itertools.chain(itertools.combinations(paths[:half], 2), itertools.combinations(paths[half:], 2))
    return sum(int((a == b).sum()) for a, b in pairs)


def test_regrouping_finds_two_kinds_of_sequences() -> None:
    draw = np.random.default_rng(1)
    kinds = np.array([0, 1, 1, 0, 1, 0, 0, 1])
    base = np.array([[1] * 10 + [0] * 10, [0] * 10 + [1] * 10], bool)
    paths = base[kinds] ^ (draw.random((8, 20)) < 0.05)
    order = regroup(paths)
    assert kinds[order].tolist() == [0] * 4 + [1] * 4
    touched = [paths[order[:4]].any(0).sum() + paths[order[4:]].any(0).sum(), paths[:4].any(0).sum() * 2]
    assert touched[0] < touched[1]


def test_an_odd_number_of_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 sequences"):
        regroup(np.zeros((3, 4), bool))
