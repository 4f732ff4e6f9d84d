"""Swiss rounds: against tournaments played out by hand, and what the paper says of specialists."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.arena import swiss_rounds
from collegium.errors import ConfigError


def test_four_methods_of_one_order() -> None:
    """Always 4 > 3 > 2 > 1 in two rounds: the best has 2 points, the worst 0; of the middle ones it depends on who met
    first, and can be counted."""
    scores = np.array([[4.0, 4], [3, 3], [2, 2], [1, 1]])
    expected = np.zeros(4)
    for pairs in ([(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 3), (1, 2)]):
        points = np.zeros(4)
        for one, other in pairs:
            points[min(one, other)] += 1
        for level in (0.0, 1.0):
            points[np.flatnonzero(points == level).min()] += 1
        expected += points / 3
    found = swiss_rounds(scores, leaving=(0,), simulations=10_000)
    assert found.points == pytest.approx(expected, abs=0.03)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(1, 5), st.integers(0, 3), st.integers(0, 10))
def test_points_are_all_given_away(methods: int, tests: int, leaving: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 3, (methods, tests))
    found = swiss_rounds(scores, leaving=(leaving,), simulations=50, seed=seed)
    left, total = methods, 0
    for _ in range(tests):
        total += -(-left // 2)  # a pair shares one point, the odd one gets one
        left -= min(leaving, left - 2) if left > 2 else 0
    assert found.points_leaving[0].sum() == pytest.approx(total)
    assert (found.points_leaving >= 0).all()
    assert (found.points_leaving <= tests).all()


def test_the_same_seed_and_equal_methods() -> None:
    scores = np.ones((4, 3))
    one, other = (swiss_rounds(scores, simulations=500, seed=3) for _ in range(2))
    assert (one.points == other.points).all()
    assert one.points.tolist() == [1.5] * 4


def test_a_specialist_falls_fastest_when_the_weakest_leave() -> None:
    """LLM Swiss Round (2025): the specialist is last but in the last three tests, where it is best. With nobody leaving
    it is ahead of the weaker all-rounders; with one leaving after each round it is last, and its slope is steepest."""
    tests, others = 8, 7
    all_rounders = [(others - i) * np.ones(tests) for i in range(others)]
    specialist = np.r_[np.zeros(tests - 3), [99.0] * 3]
    found = swiss_rounds(np.stack([*all_rounders, specialist]), leaving=(0, 1, 2), simulations=5_000)
    assert found.points_leaving[0, -1] > found.points_leaving[0, -2]
    assert found.points_leaving[1].argmin() == found.slope.argmin() == others


def test_order_of_methods_does_not_matter() -> None:
    scores = np.random.default_rng(0).normal(size=(5, 6))
    found = swiss_rounds(scores, leaving=(0,), simulations=5_000).points
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 50):
        again = swiss_rounds(scores[list(order)], leaving=(0,), simulations=5_000).points
        assert again == pytest.approx(found[list(order)], abs=0.05)


@pytest.mark.parametrize("wrong", [np.ones((1, 3)), np.ones((3, 0)), np.array([[1.0], [np.nan]]), np.ones(3)])
def test_no_tournament(wrong: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="a tournament takes"):
        swiss_rounds(wrong)
