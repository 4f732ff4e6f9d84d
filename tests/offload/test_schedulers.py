"""Schedulers: orders, HybriMoE's two processors, and ExpertFlow's regrouping of sequences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import ConfigError
from collegium.offload.cost import CostModel
from collegium.offload.predictors.base import FEW
from collegium.offload.schedule import divide, load_order
from collegium.offload.schedule.device import Device, find_device
from collegium.offload.schedule.hybrimoe import Hybrid
from collegium.offload.schedule.popularity import popularity
from collegium.offload.schedule.regroup import Regroup
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
    st.tuples(TIMES, TIMES, TIMES, TIMES, TIMES, TIMES),
)
def test_two_processors_are_never_worse_than_one(step: list[tuple[bool, int]], times: tuple[float, ...]) -> None:
    cost = Hybrid(*times)
    resident = np.array([there for there, _ in step], np.bool_)
    counts = np.array([count for _, count in step], np.int64)
    found = cost.schedule(resident, counts)
    assert sorted(found.fast + found.slow) == list(range(len(step)))
    assert set(found.moved) == {place for place in found.fast if not resident[place]}
    all_fast = cost.timed(popularity(resident, counts).tolist(), (), resident, counts)
    all_slow = cost.timed((), range(len(step)), resident, counts)
    assert found.makespan <= min(all_fast.makespan, all_slow.makespan) + 1e-9
    assert all_fast.slow_seconds == all_slow.fast_seconds == 0
    # the fast one's time, gone through again from its order alone
    link = done = 0.0
    for place in found.fast:
        link += 0.0 if resident[place] else cost.transfer
        done = max(done, 0.0 if resident[place] else link) + cost.fast + cost.fast_token * counts[place]
    assert found.fast_seconds == pytest.approx(done)


def test_the_interface_of_one_processor_and_of_two() -> None:
    """`divide` names who computes what; all on the fast one is what `load_order` says."""
    resident, counts = np.array([True, True, False, False]), np.array([5, 1, 4, 1])
    mass = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    both = divide(resident, mass, counts, 8, COST)
    assert (both.fast, both.slow, both.moved) == ((0, 1, 2), (3,), (2,))
    for tokens in (FEW, FEW + 1):
        fast = divide(resident, mass, counts, tokens, COST, "fast")
        assert fast.fast == tuple(load_order(resident, mass, counts, tokens))
        assert fast.slow == ()
    assert fast.makespan == pytest.approx(4 * 0.5)  # transfers hide behind what is there
    slow = divide(resident, mass, counts, 8, COST, "slow")
    assert (slow.fast, slow.moved) == ((), ())
    assert slow.makespan == pytest.approx(11 + 0.79)


def test_a_device_in_plain_units() -> None:
    points = ((1.0, 0.003), (FEW, 0.003 + 0.001 * (FEW - 1)))
    cost = CostModel(
        read_bandwidth=1, read_latency=0, memory_bandwidth=1, expert={8: points}, call_seconds=0.01, measured="a test"
    )
    name, device = find_device("gpu: seconds=0.0004, gflops=2, transfer=2, latency=0.001")
    assert (name, device) == ("gpu", Device(transfer=2, seconds=0.0004, gflops=2, latency=0.001))
    times = device.beside(cost, 8, 10_000_000)  # ten million weights: 20 million operations a token
    assert times.fast == 0.0004
    assert times.fast_token == pytest.approx(0.01)
    assert times.transfer == pytest.approx(0.001 + 0.005)
    assert times.slow == pytest.approx(0.001)
    assert times.slow_expert == pytest.approx(0.002)
    assert times.slow_start == 0.01
    assert Device(transfer=1, seconds=0.5).beside(cost, 8, 10).fast_token == 0
    for text, message in (
        ("gpu", "transfer"),
        ("gpu:transfer=12", "how fast"),
        (":seconds=1,transfer=1", "no name"),
        ("gpu:seconds=1,transfer=0", "transfer must be a number above 0"),
        ("gpu:seconds=-1,transfer=1", "seconds must be a number of at least 0"),
        ("gpu:gflops=nan,transfer=1", "gflops must"),
        ("gpu:speed=1,transfer=1", "no setting 'speed'"),
        ("gpu:seconds=fast,transfer=1", "seconds"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_device(text)


def test_times_of_a_schedule_are_checked() -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        Hybrid(fast=-1, slow=1, slow_start=0, transfer=0)


@given(st.integers(0, 8), st.integers(0, 1000))
def test_regrouping_is_a_permutation_that_is_never_less_alike(half: int, seed: int) -> None:
    paths = np.random.default_rng(seed).random((2 * half, 12)) < 0.3
    order = Regroup(seed).order(paths)
    assert sorted(order.tolist()) == list(range(2 * half))
    assert order.tolist() == Regroup(seed).order(paths).tolist()
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
    order = Regroup().order(paths)
    assert kinds[order].tolist() == [0] * 4 + [1] * 4
    touched = [paths[order[:4]].any(0).sum() + paths[order[4:]].any(0).sum(), paths[:4].any(0).sum() * 2]
    assert touched[0] < touched[1]


def test_an_odd_number_of_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 sequences"):
        Regroup().order(np.zeros((3, 4), bool))
    with pytest.raises(ConfigError, match="rounds"):
        Regroup(rounds=0)
