"""What is read ahead, and in which order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.errors import ConfigError
from collegium.offload.cache import ExpertCache
from collegium.offload.geometry import Geometry
from collegium.offload.policies import find_policy
from collegium.offload.precision.base import Choice, PrecisionPolicy
from collegium.offload.predictors.base import Prediction
from collegium.offload.prefetch import Copies, Prefetch, find_prefetch, impact_order, plan

E = 5
GEOMETRY = Geometry((E,) * 4, (2,) * 4, tuple(range(4)))
SCORES = {1: [0.1, 0.9, 0.5, 0.5, 0.0], 2: [0.8, 0.2, 0.1, 0.0, 0.7], 3: [0.0, 0.0, 0.1, 1.0, 0.4]}
PREDICTIONS = [Prediction(layer, np.array(scores)) for layer, scores in SCORES.items()]


def resident(*keys: tuple[int, int]):
    def of(layer: int) -> np.ndarray:
        return np.array([(layer, expert) in keys for expert in range(E)])

    return of


def planned(text: str, there=resident(), **times: float) -> list[tuple[int, int]]:  # noqa: B008
    return plan(find_prefetch(text), PREDICTIONS, GEOMETRY, there, **times)


def test_nearest_layer_first_then_score() -> None:
    assert planned("") == [(1, 1), (1, 2)]
    assert planned("depth=3") == [(1, 1), (1, 2), (2, 0), (2, 4), (3, 3), (3, 4)]
    assert planned("width=3") == [(1, 1), (1, 2), (1, 3)]
    assert planned("width=1,depth=2") == [(1, 1), (2, 0)]
    assert planned("width=2,depth=2", resident((1, 1), (2, 0), (2, 4))) == [(1, 2)]
    assert planned("width=5,threshold=0.5") == [(1, 1), (1, 2), (1, 3)]


def test_adaptive_depth_stops_at_the_first_layer_that_lacks_one() -> None:
    there = [(1, 1), (1, 2)]
    assert planned("depth=adaptive") == [(1, 1), (1, 2)]
    assert planned("depth=adaptive", resident(*there)) == [(2, 0), (2, 4)]
    assert planned("depth=adaptive", resident(*there, (2, 0), (2, 4))) == [(3, 3), (3, 4)]
    assert planned("depth=adaptive", resident(*there, (2, 0))) == [(2, 4)]


def test_adaptive_width_is_what_time_allows() -> None:
    """Fate: floor(seconds / seconds a load) of the absent ones; layers further off have more time."""
    assert planned("width=adaptive", seconds=3.5, per_load=1) == [(1, 1), (1, 2), (1, 3)]
    assert planned("width=adaptive", resident((1, 1)), seconds=2.9, per_load=1) == [(1, 2), (1, 3)]
    assert planned("width=adaptive", seconds=0.5, per_load=1) == []
    assert planned("width=adaptive,depth=2", seconds=1, per_load=1) == [(1, 1), (2, 0)]
    assert planned("width=adaptive,depth=2", seconds=0.5, per_load=1) == [(2, 0)]
    assert planned("width=adaptive") == planned("width=top_k")  # times are not known


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-5, 5), min_size=E, max_size=E), min_size=1, max_size=3),
    st.sets(st.tuples(st.integers(1, 3), st.integers(0, E - 1))),
    st.sampled_from([1, 3, "top_k", "adaptive"]),
    st.sampled_from([1, 2, "adaptive"]),
    st.floats(0, 3),
)
def test_only_absent_experts_each_once_and_no_more_than_time_allows(
    scores: list[list[float]], there: set[tuple[int, int]], width: int | str, depth: int | str, seconds: float
) -> None:
    predictions = [Prediction(layer, np.array(row)) for layer, row in enumerate(scores, start=1)]
    settings = Prefetch(width=width, depth=depth)  # type: ignore[arg-type]
    found = plan(settings, predictions, GEOMETRY, resident(*there), seconds=seconds, per_load=1)
    assert len(set(found)) == len(found)
    assert not set(found) & there
    layers = [layer for layer, _ in found]
    assert layers == sorted(layers)
    if depth != "adaptive":
        assert max(layers, default=1) <= depth
    for layer in set(layers):
        got = [scores[layer - 1][expert] for of, expert in found if of == layer]
        assert got == sorted(got, reverse=True)
        if width == "adaptive":
            assert sum(of <= layer for of in layers) <= layer * seconds


def test_impact_is_what_the_schedule_saves() -> None:
    """Layer 2 waits for its slowest load; of layer 1 a load saves little. Of equals the nearest comes first."""
    cost = {1: np.array([1.0, 2, 0, 0, 0]), 2: np.array([0.0, 0, 5, 2, 0])}

    def makespan(layer: int, there: np.ndarray) -> float:
        return float((cost[layer] * ~there).sum())

    candidates = [(1, 0), (1, 1), (2, 2), (2, 3)]
    found = impact_order(candidates, lambda layer: np.zeros(E, bool), makespan)
    assert found == [(2, 2), (1, 1), (2, 3), (1, 0)]
    assert impact_order([], resident(), makespan) == []


def test_impact_is_told_what_was_taken_before() -> None:
    """Two loads that save only together are worth as much as the second of them once the first is taken."""

    def makespan(layer: int, there: np.ndarray) -> float:
        return {1: 3.0 - 2.0 * there[0], 2: 4.0 - 4.0 * (there[1] and there[2]) - 0.5 * (there[1] and not there[2])}[
            layer
        ]

    found = impact_order([(1, 0), (2, 1), (2, 2)], lambda layer: np.zeros(E, bool), makespan)
    assert found == [(1, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    "text",
    ["width=0", "depth=0", "threshold=2", "width=many", "far=1", "width", "depth=1,depth=2", "order=best"],
)
def test_what_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="prefetch"):
        find_prefetch(text)


def test_impact_takes_two_processors() -> None:
    assert find_prefetch("order=score").for_one_processor().order == "score"
    with pytest.raises(ConfigError, match="two processors"):
        find_prefetch("order=impact").for_one_processor()


class ByParity(PrecisionPolicy):
    """Even experts exactly, odd ones in the low copy."""

    def choose(self, choice: Choice) -> np.ndarray:
        return np.where(choice.experts % 2, self.bits[1], self.bits[0]).astype(np.uint8)

    def ahead(self, layer: int) -> np.ndarray:
        return np.where(np.arange(E) % 2, self.bits[1], self.bits[0]).astype(np.uint8)


def test_the_copy_that_is_read_ahead_is_the_one_that_is_looked_for() -> None:
    caches = {bits: ExpertCache(GEOMETRY, 8, find_policy("expertflow").build(GEOMETRY, 8)) for bits in (16, 4)}
    copies = Copies(ByParity(GEOMETRY, (16, 4)), caches)
    assert [copies.bits(1, expert) for expert in range(E)] == [16, 4, 16, 4, 16]
    caches[16].request(1, np.array([0, 1]))  # its copy of 1 is of no use
    caches[4].request(1, np.array([3, 4]))
    assert copies.resident(1).tolist() == [True, False, False, True, False]
    told: dict[int, list[float]] = {}
    for bits, cache in caches.items():
        cache.policy.expect = lambda layer, scores, bits=bits: told.update({bits: scores.tolist()})  # type: ignore
    copies.expect(PREDICTIONS[:1])
    no = -np.inf
    assert told == {16: [0.1, no, 0.5, no, 0.0], 4: [no, 0.9, no, 0.5, no]}
