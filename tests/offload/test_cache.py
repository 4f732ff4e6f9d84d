"""`ExpertCache` under every policy: random streams with waves, reading ahead and failures never break its rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_drive import POLICIES, Drive, use

from collegium.errors import ConfigError
from collegium.offload.cache import ExpertCache, Found
from collegium.offload.events import EventLog
from collegium.offload.geometry import Geometry
from collegium.offload.policies import CachePolicy, find_policy
from collegium.offload.policies.lru import LRU
from collegium.offload.policies.opt import OPT, Stream

EVEN = Geometry(experts=(6, 6, 6), top_k=(2, 2, 2), layers=(0, 1, 2))
UNEVEN = Geometry(experts=(3, 8, 5), top_k=(1, 3, 2), layers=(0, 2, 5))


@st.composite
def streams(draw: Any) -> tuple[Geometry, int, list[tuple[int, list[int]]], list[list[tuple[int, int]]], set[int]]:
    """A geometry, a capacity, steps in running order, prefetches after each, and the loads that fail."""
    geometry = draw(st.sampled_from([EVEN, UNEVEN]))
    capacity = draw(st.integers(geometry.num_layers, geometry.total))
    steps, ahead = [], []
    for number in range(draw(st.integers(1, 24))):
        layer = number % geometry.num_layers
        E = geometry.experts[layer]
        steps.append((layer, draw(st.lists(st.integers(0, E - 1), min_size=1, max_size=E, unique=True))))
        key = st.integers(0, geometry.total - 1).map(geometry.split)
        ahead.append(draw(st.lists(key, max_size=3)))
    return geometry, capacity, steps, ahead, draw(st.sets(st.integers(0, 40), max_size=6))


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=20, deadline=None)
@given(streams())
def test_every_policy_keeps_the_rules_of_the_cache(name: str, drawn: Any) -> None:
    geometry, capacity, steps, ahead, failing = drawn
    logs = []
    for _ in range(2):
        drive = Drive.of(name, geometry, capacity, steps, failing)
        for (layer, experts), coming in zip(steps, ahead, strict=True):
            drive.step(layer, experts, coming)
        logs.append(drive.log)
    for column in ("step", "layer", "expert", "found", "evicted"):
        np.testing.assert_array_equal(logs[0][column], logs[1][column])


def test_a_step_with_more_experts_than_slots_comes_in_waves() -> None:
    drive = Drive.of("lru:scope=global", EVEN, 3, [])
    drive.step(0, [5, 1, 3, 0, 2])
    assert drive.log["expert"].tolist() == [5, 1, 3, 0, 2]
    assert drive.log["evicted"].tolist() == [-1, -1, -1, 5, 1]
    assert drive.cache.peak == 3


def test_found_tells_hits_prefetches_late_ones_and_misses_apart() -> None:
    cache = ExpertCache(EVEN, 12, LRU().build(EVEN, 12))
    assert cache.prefetch(0, 1) is not None
    assert cache.prefetch(0, 2) is not None
    assert cache.prefetch(0, 2) is None  # it is coming already
    assert cache.prefetch(0, 3) is None  # a demand must find room for one token's experts
    cache.arrived(0, 1)
    request = cache.request(0, np.array([0, 1, 2]))
    assert request.experts.tolist() == [1, 2, 0]
    assert request.found.tolist() == [Found.PREFETCHED, Found.LATE, Found.MISS]
    assert cache.is_resident(0).tolist() == [True, True, True, False, False, False]
    assert cache.is_ready(0).tolist() == [False, True, False, False, False, False]
    for expert in (0, 2):
        cache.arrived(0, expert)
    cache.release(0, request.experts)
    cache.finish(use(EVEN, 0, request.experts.tolist()))
    assert cache.request(0, np.array([1])).found.tolist() == [Found.HIT]


def test_a_failed_load_gives_its_slot_back() -> None:
    cache = ExpertCache(EVEN, 3, LRU(scope="global").build(EVEN, 3))
    first = cache.request(0, np.array([0, 1, 2]))
    cache.arrived(0, 0)
    cache.failed(0, 1)
    cache.arrived(0, 2)
    cache.release(0, first.experts)
    again = cache.request(0, np.array([1, 0]))
    assert again.found.tolist() == [Found.HIT, Found.MISS]
    assert again.evicted.tolist() == [-1, -1]


def test_quotas_are_checked() -> None:
    class Greedy(type(LRU().build(EVEN, 6))):  # type: ignore[misc]
        def quotas(self) -> np.ndarray[Any, Any]:
            return np.array([4, 1, 2])

    with pytest.raises(ConfigError, match="in all at most 6 slots"):
        ExpertCache(EVEN, 6, Greedy(EVEN, 6))
    with pytest.raises(ConfigError, match="cannot hold an expert"):
        ExpertCache(EVEN, 0, LRU(scope="global").build(EVEN, 0))
    with pytest.raises(ConfigError, match="fewer than"):
        LRU().build(EVEN, 2)


def test_a_demand_finds_a_slot_although_quotas_moved_while_reads_were_under_way() -> None:
    class Moving(CachePolicy):
        shares = np.array([10, 1, 1])

        def quotas(self) -> np.ndarray[Any, Any]:
            return self.shares

        def used(self, use: Any) -> None: ...

        def victim(self, candidates: np.ndarray[Any, Any], incoming: int) -> int:
            return int(candidates[0])

    geometry = Geometry(experts=(12, 12, 12), top_k=(1, 1, 1), layers=(0, 1, 2))
    policy = Moving(geometry, 12)
    cache = ExpertCache(geometry, 12, policy)
    for expert in range(9):
        cache.prefetch(0, expert)
    for layer in (1, 2):
        cache.request(layer, np.array([0]))
        cache.arrived(layer, 0)
        cache.release(layer, np.array([0]))
    cache.request(0, np.array([11]))
    policy.shares = np.array([2, 8, 2])
    for expert in (1, 2):  # all that is over its share is on its way; what others hold must do
        request = cache.request(1, np.array([expert]))
        assert len(request.experts) == 1
        cache.arrived(1, expert)
        cache.release(1, request.experts)


def test_event_logs_come_back_and_others_are_refused(tmp_path: Any) -> None:
    from collegium.errors import TraceError

    drive = Drive.of("lru", EVEN, 6, [])
    for number in range(3000):
        drive.step(number % 3, [number % 5, 5])
    drive.log.wait(3, 0.5)
    drive.log.wait(3, 0.25)
    drive.log.save(tmp_path / "events.parquet")
    loaded = EventLog.load(tmp_path / "events.parquet")
    assert len(loaded) == len(drive.log) == 6000
    assert loaded["waited"][3] == np.float32(0.75)
    for column in ("step", "layer", "expert", "found", "evicted", "bits", "bytes", "waited"):
        np.testing.assert_array_equal(loaded[column], drive.log[column])
    assert (loaded["bytes"] > 0).sum() == (loaded["found"] == Found.MISS).sum()
    loaded.add(1, drive.cache.request(0, np.array([5])), 16, 10)
    assert len(loaded["step"]) == 6001
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(TraceError, match="not readable as an event log"):
        EventLog.load(tmp_path / "bad.parquet")


def test_opt_is_for_the_simulator() -> None:
    with pytest.raises(ConfigError, match="simulator only"):
        find_policy("opt").build(EVEN, 6)
    policy = OPT().knowing(Stream(np.array([0]), np.array([0, 1]))).build(EVEN, 6)
    policy.used(use(EVEN, 0, [0]))
    with pytest.raises(ConfigError, match="fewer steps"):
        policy.used(use(EVEN, 0, [0]))
