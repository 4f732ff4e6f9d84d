"""Intervals of numbers made from additive statistics of blocks of documents."""

from __future__ import annotations

import numpy as np

from collegium.measure.estimate import bootstrap


def _mean(total: np.ndarray) -> float:
    return float(total[0] / total[1])


def test_an_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        blocks = np.stack([rng.normal(3.0, 1.0, 40), np.ones(40)], 1)
        (found,) = bootstrap(blocks, _mean, seed=seed)
        covered += found.low <= 3.0 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_more_blocks_make_it_narrower() -> None:
    rng = np.random.default_rng(1)
    widths = []
    for B in (8, 64):
        (found,) = bootstrap(np.stack([rng.normal(0, 1, B), np.ones(B)], 1), _mean)
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 1.7


def test_bounds_cut_the_interval_and_not_the_value() -> None:
    blocks = np.stack([[0.0, 1, 1, 1, 1, 1], np.ones(6)], 1)
    (free,) = bootstrap(blocks, _mean)
    (cut,) = bootstrap(blocks, _mean, bounds=(0, 1))
    assert free.high > 1 == cut.high
    assert cut.value == free.value
    assert cut.low == free.low


def test_one_block_says_nothing_about_the_spread() -> None:
    (found,) = bootstrap(np.array([[2.0, 1.0]]), _mean)
    assert found.value == 2
    assert np.isnan(found.low)
    assert np.isnan(found.high)
