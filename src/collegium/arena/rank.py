"""An overall order of methods over many tests, by a Swiss-system tournament (LLM Swiss Round, 2025).

Legend: M methods, B tests, N simulated tournaments, T methods that leave after each round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.errors import ConfigError
from collegium.rng import seed_of

__all__ = ["Ranking", "swiss_rounds"]

Array = np.ndarray[Any, np.dtype[Any]]
_CHUNK = 20_000


@dataclass(frozen=True, eq=False)
class Ranking:
    """Attributes:
    points: ``[M]`` mean points over the tournaments, at most B, with nobody leaving.
    leaving: the numbers T that were tried.
    points_leaving: ``[len(leaving), M]`` mean points with so many leaving after each round.
    slope: ``[M]`` of mean points over T, a least-squares line: a specialist, who loses early, falls faster than a
        generalist.
    """

    points: Array
    leaving: tuple[int, ...]
    points_leaving: Array
    slope: Array


def swiss_rounds(
    scores: Array, *, leaving: Sequence[int] = (0, 1, 2), simulations: int = 100_000, seed: int = 0
) -> Ranking:
    """Rank methods by tournaments in which those with equal points meet.

    A tournament has a round for each test, in order. Methods that are still in are paired with those of as many points,
    at random; one that is left over goes to the next lower points, and the very last gets a point without playing. The
    higher score in the round's test gets the point, equal ones half a point each. Then the T with the fewest points
    leave, ties at random, as long as two stay. (The paper's abstract leaves the odd one and ties open: these are the
    usual rules of the Swiss system.)

    Args:
        scores: ``[M, B]``, higher is better.
        leaving: values of T.
        simulations: N for each T.
        seed: of all pairings.

    Raises:
        ConfigError: fewer than two methods or no test, or a score that is not finite.
    """
    scores = np.asarray(scores, float)
    if scores.ndim != 2 or len(scores) < 2 or not scores.shape[1] or not np.isfinite(scores).all():
        raise ConfigError(f"a tournament takes finite scores of two methods or more in one test or more, not {scores}")
    found = np.stack([_mean_points(scores, T, simulations, seed) for T in leaving])
    x = np.asarray(leaving, float) - np.mean(leaving)
    slope = x @ found / max(x @ x, 1e-12)
    plain = found[leaving.index(0)] if 0 in leaving else _mean_points(scores, 0, simulations, seed)
    return Ranking(plain, tuple(leaving), found, slope)


def _mean_points(scores: Array, T: int, simulations: int, seed: int) -> Array:
    total = np.zeros(len(scores))
    for at in range(0, simulations, _CHUNK):
        rng = np.random.default_rng(seed_of("swiss_rounds", seed, T, at))
        total += _tournaments(scores, T, min(_CHUNK, simulations - at), rng).sum(0)
    return total / simulations


def _tournaments(scores: Array, T: int, N: int, rng: np.random.Generator) -> Array:
    """``[N, M]`` points of N tournaments."""
    M, B = scores.shape
    points = np.zeros((N, M))
    playing = np.ones((N, M), bool)
    rows = np.arange(N)[:, None]
    left = M
    for test in range(B):
        # by points, at random among equals; who has left comes last
        order = np.argsort(np.where(playing, -points, np.inf) + 0.25 * rng.random((N, M)), axis=1)
        one, other = order[:, 0 : left - 1 : 2], order[:, 1:left:2]
        mine, theirs = scores[one, test], scores[other, test]
        points[rows, one] += (mine > theirs) + 0.5 * (mine == theirs)
        points[rows, other] += (theirs > mine) + 0.5 * (mine == theirs)
        if left % 2:
            points[rows[:, 0], order[:, left - 1]] += 1
        out = min(T, left - 2)
        if out > 0:
            fewest = np.argsort(np.where(playing, points, np.inf) + 0.25 * rng.random((N, M)), axis=1)[:, :out]
            playing[rows, fewest] = False
            left -= out
    return points
