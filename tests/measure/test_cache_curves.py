"""Cache curves: the published vectors, a cache simulated one capacity at a time, properties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.errors import ConfigError
from collegium.measure import cache_curves
from collegium.measure.kernels import lru_depths, sch_depths
from measure_traces import make_trace


def simulate(experts: np.ndarray, E: int, capacity: int, m: int) -> int:
    """Hits of one cache, step by step; m = 0 is LRU."""
    requests = [[int(e) for e in row if e < E] for row in experts]
    resident: set[int] = set()
    used: dict[int, tuple[int, int]] = {}
    hits = 0
    for t, request in enumerate(requests):
        hits += sum(e in resident for e in request)
        resident |= set(request)
        for slot, e in enumerate(request):
            used[e] = (t, -slot)
        coming = [e for later in requests[t + 1 : t + 1 + m] for e in later]
        idle = sorted(resident - set(request), key=lambda e: (coming.count(e), used[e]))
        resident -= set(idle[: max(len(resident) - capacity, 0)])
    return hits


def depths(experts: np.ndarray, E: int, m: int) -> np.ndarray:
    """Of all tokens, counted in three blocks."""
    block = (np.arange(len(experts)) % 3).astype(np.uint8)
    found = sch_depths(experts, E, m, block, 3) if m else lru_depths(experts, E, block, 3)
    assert found.shape == (3, E)
    return found.sum(0)


ABCABC = np.array([0, 1, 2, 0, 1, 2])[:, None]


@pytest.mark.parametrize(("m", "hits"), [(0, 0), (1, 2), (2, 1), (3, 1)])
def test_the_published_vectors(m: int, hits: int) -> None:
    """A B C A B C in a cache of two; m = 0 is LRU."""
    assert depths(ABCABC, 3, m)[:2].sum() == hits == simulate(ABCABC, 3, 2, m)


def test_the_curve_of_the_published_stream(tmp_path: Path) -> None:
    (found,) = cache_curves(make_trace(tmp_path, {3: ABCABC}, 3), segment=1)
    assert found.capacity.tolist() == [1, 2, 3]
    assert found.ratio.tolist() == [1, 2, 3]
    assert found.sch.tolist() == pytest.approx([0, 2 / 6, 3 / 6])
    assert found.lru.tolist() == pytest.approx([0, 0, 3 / 6])
    assert (found.layer, found.segment, found.first_touch) == (3, 1, "miss")
    assert (found.requests, found.tokens) == (6, 6)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    E=st.integers(1, 9),
    K=st.integers(1, 4),
    N=st.integers(1, 60),
    m=st.integers(0, 12),
    ragged=st.booleans(),
)
def test_every_capacity_agrees_with_its_own_simulation(seed: int, E: int, K: int, N: int, m: int, ragged: bool) -> None:
    random = np.random.default_rng(seed)
    K = min(K, E)
    skew = 1 / np.arange(1, E + 1)
    experts = np.stack([random.choice(E, K, replace=False, p=skew / skew.sum()) for _ in range(N)])
    if ragged:
        experts[random.random((N, K)) < 0.3] = E
    hits = np.cumsum(depths(experts.astype(np.uint16), E, m))
    assert [hits[C - 1] for C in range(K, E + 1)] == [simulate(experts, E, C, m) for C in range(K, E + 1)]


def sticky_layer(N: int = 2000, E: int = 32, K: int = 4) -> np.ndarray:
    random = np.random.default_rng(0)
    return np.stack([(random.permutation(8)[:K] + 8 * (t // 100 % 4)) % E for t in range(N)])


def test_local_routing_needs_a_small_cache_and_shuffled_routing_a_large_one(tmp_path: Path) -> None:
    (found,) = cache_curves(make_trace(tmp_path, {0: sticky_layer()}, 32))
    assert found.capacity.tolist() == [4, 6, 8, 12, 16, 24, 32]
    for curve in (found.sch, found.lru, found.lru_shuffled):
        assert (np.diff(curve) >= 0).all()
        assert curve[-1] == pytest.approx(1 - 32 / found.requests)  # first touches miss
    at = found.capacity.tolist().index(8)
    assert found.lru[at] > 0.95
    assert found.lru_shuffled[at] < 0.4
    assert (found.sch >= found.lru).all()
    assert found.summary()["LRU"].value == found.lru[at]


def test_chosen_ratios_are_rounded_and_end_at_all_experts(tmp_path: Path) -> None:
    trace = make_trace(tmp_path, {0: sticky_layer(200)}, 32)
    (found,) = cache_curves(trace, ratios=[100, 1.1, 1.2, 2.6])
    assert found.capacity.tolist() == [4, 5, 10, 32]
    (every,) = cache_curves(trace, ratios=np.arange(4, 33) / 4)
    assert found.lru.tolist() == every.lru[np.searchsorted(every.capacity, found.capacity)].tolist()


def test_hits_are_counted_in_the_block_of_their_token() -> None:
    """A B A | A B: in a cache of two the third token and the last two hit."""
    experts, block = np.array([0, 1, 0, 0, 1])[:, None], np.array([0, 0, 0, 1, 1], np.uint8)
    for found in (lru_depths(experts, 3, block, 2), sch_depths(experts, 3, 2, block, 2)):
        assert found[:, :2].sum(1).tolist() == [1, 2]


def documents_of(count: int, length: int = 80, E: int = 24, K: int = 2, *, seed: int = 0) -> list[np.ndarray]:
    """Documents that each stay within a few experts of their own, some in fewer than others."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        own = random.choice(E, random.integers(K + 1, 13), replace=False)
        found.append(np.stack([random.permutation(own)[:K] for _ in range(length)]))
    return found


def curve_of(folder: Path, documents: list[np.ndarray], E: int = 24) -> Any:
    sequences = np.repeat(np.arange(len(documents)), [len(one) for one in documents])
    (found,) = cache_curves(make_trace(folder, {0: np.concatenate(documents)}, E, sequences=sequences))
    return found


def widths(found: Any, name: str) -> np.ndarray:
    return np.diff(getattr(found, f"{name}_interval"), axis=1)[:, 0]


@pytest.mark.parametrize("name", ["lru", "sch"])
def test_intervals_hold_the_value_and_shrink_with_more_documents(tmp_path: Path, name: str) -> None:
    few, many = (curve_of(tmp_path / str(count), documents_of(count)) for count in (8, 128))
    for found in (few, many):
        low, high = getattr(found, f"{name}_interval").T
        value = getattr(found, name)
        assert ((low <= value) & (value <= high)).all()
        assert (low >= 0).all()
        assert (high <= 1).all()
        assert (high[:-1] > low[:-1]).all()
    inner = slice(1, -2)  # the smallest caches hardly hit and the largest hardly miss
    assert (widths(many, name)[inner] < widths(few, name)[inner] / 2).all()
    row = many.summary()["LRU" if name == "lru" else "SCH 16"]
    assert row.low < row.value < row.high


def test_the_order_of_documents_hardly_changes_an_interval(tmp_path: Path) -> None:
    documents = documents_of(100)
    one = curve_of(tmp_path / "one", documents)
    other = curve_of(tmp_path / "other", [documents[i] for i in np.random.default_rng(5).permutation(100)])
    at = one.capacity.tolist().index(8)
    assert widths(one, "lru")[at] == pytest.approx(widths(other, "lru")[at], rel=0.4)
    assert abs(one.lru[at] - other.lru[at]) < widths(one, "lru")[at]


def test_one_document_has_no_interval(tmp_path: Path) -> None:
    found = curve_of(tmp_path, documents_of(1))
    assert found.lru_interval is None
    assert found.sch_interval is None
    assert np.isnan(found.summary()["LRU"].low)


@pytest.mark.parametrize("wrong", [{"ratios": [0.9, 2]}, {"ratios": []}, {"ratios": [np.nan]}, {"segment": 0}])
def test_caches_too_small_for_a_token_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"ratios|segment"):
        cache_curves(make_trace(tmp_path, {0: [[1]]}, 2), **wrong)


def test_other_names_of_experts_change_nothing(tmp_path: Path) -> None:
    names = np.random.default_rng(1).permutation(32)
    (one,) = cache_curves(make_trace(tmp_path / "one", {0: sticky_layer(300)}, 32))
    (other,) = cache_curves(make_trace(tmp_path / "other", {0: names[sticky_layer(300)]}, 32))
    assert one.sch.tolist() == other.sch.tolist()
    assert one.lru.tolist() == other.lru.tolist()


def test_short_and_uneven_traces(tmp_path: Path) -> None:
    (one,) = cache_curves(make_trace(tmp_path / "one", {0: [[1]]}, 2))
    assert (one.lru.tolist(), one.requests) == ([0, 0], 1)
    found = cache_curves(
        make_trace(tmp_path / "two", {0: [[2], [2], [2]], 1: [[299, 5], [300, 5], [5, 299]]}, {0: 2, 1: 300})
    )
    assert (found[0].requests, found[0].sch.tolist(), found[0].sch_interval) == (0, [0, 0], None)
    assert found[1].lru.tolist() == pytest.approx([3 / 5] * len(found[1].capacity))
    assert found[1].capacity[-1] == 300
