"""The congestion game: its equilibrium, and the coefficient nearest given loads. See `collegium.measure.congestion`.

Legend: E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from collegium.jit import njit

__all__ = ["MAX_TEMPERATURE", "equilibrium", "fit_gamma", "fit_temperature"]

Array = np.ndarray[Any, np.dtype[Any]]

MAX_TEMPERATURE = 64.0
"""The search ends at the gamma that flattens loads as a softmax of this temperature does: ``(64 - 1) E``."""


@njit(cache=True)
def _omega(s: float) -> float:
    """The y > 0 with ``y + log y = s`` (Wright's omega), by Fritsch's iteration of fourth order (1973)."""
    if s < -30.0:
        return np.exp(s)
    y = s - np.log(s) if s > 1.0 else np.exp(s) / (1.0 + np.exp(s))
    for _ in range(8):
        rest = s - y - np.log(y)
        if abs(rest) < 1e-14 * max(1.0, abs(s)):
            break
        step = (1.0 + y) * (1.0 + y + 2.0 / 3.0 * rest)
        y *= 1.0 + rest / (1.0 + y) * (step - 0.5 * rest) / (step - rest)
    return y


@njit(cache=True)
def _solve(Q: Array, gamma: float, p: Array) -> None:
    """Fill `p` with the equilibrium."""
    highest = Q.max()
    lse = highest + np.log(np.exp(Q - highest).sum())
    if gamma < 1e-9:
        p[:] = np.exp(Q - lse)
        return
    # c is the multiplier of sum p = 1; each p_i solves log p + gamma p = Q_i - c, and sum p falls as c grows
    low, high = lse - gamma, lse
    c = min(max(Q.mean() + np.log(len(Q)) - gamma / len(Q), low), high)
    log_gamma = np.log(gamma)
    for _ in range(100):
        total, slope = 0.0, 0.0
        for i in range(len(Q)):
            y = _omega(Q[i] - c + log_gamma)
            p[i] = y / gamma
            total += p[i]
            slope += p[i] / (1.0 + y)
        if abs(total - 1.0) < 1e-12:
            break
        if total > 1.0:
            low = c
        else:
            high = c
        c += np.log(total) * total / slope
        if not low < c < high:
            c = 0.5 * (low + high)
    p /= p.sum()


@njit(cache=True)
def equilibrium(Q: Array, gamma: float) -> Array:
    """The loads ``p [E]`` with ``p_i`` proportional to ``exp(Q_i - gamma p_i)``; unique for gamma >= 0.

    Newton's method on the dual of the convex potential ``sum p log p - Q.p + gamma/2 p.p``, kept inside a bracket; the
    sum is 1 to 1e-12 before it is normalised.

    Args:
        Q: ``[E]`` float64 qualities; a constant added to them changes nothing.
        gamma: at least 0.
    """
    p = np.empty_like(Q)
    _solve(Q, gamma, p)
    return p


@njit(cache=True)
def _loss(kind: int, at: float, Q: Array, p: Array, work: Array) -> float:
    """L1 distance of `p` from the game (kind 0) or the softmax (kind 1) of temperature `at`."""
    if kind == 0:
        _solve(Q, (at - 1.0) * len(Q), work)
    else:
        _solve(Q / at, 0.0, work)
    return np.abs(work - p).sum()


@njit(cache=True)
def _search(kind: int, grid: Array, Q: Array, p: Array) -> float:
    """The best temperature: the best of an ascending grid, then golden section between its neighbours."""
    work = np.empty_like(Q)
    best, lowest = 0, np.inf
    for i in range(len(grid)):
        found = _loss(kind, grid[i], Q, p, work)
        if found < lowest:
            best, lowest = i, found
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    ratio = (np.sqrt(5.0) - 1.0) / 2.0
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = _loss(kind, a, Q, p, work), _loss(kind, b, Q, p, work)
    for _ in range(18):
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = _loss(kind, a, Q, p, work)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = _loss(kind, b, Q, p, work)
    middle = 0.5 * (low + high)
    return middle if _loss(kind, middle, Q, p, work) < lowest else grid[best]


_GAMMAS = 1.0 + np.concatenate([[0.0], np.geomspace(0.01, MAX_TEMPERATURE - 1, 16)])
_TEMPERATURES = np.geomspace(1 / 16, 16 * MAX_TEMPERATURE, 20)


def fit_gamma(Q: Array, p: Array) -> float:
    """The gamma in ``[0, (MAX_TEMPERATURE - 1) E]`` whose equilibrium is nearest ``p [E]`` in L1, given ``Q [E]``."""
    return float((_search(0, _GAMMAS, Q, p) - 1.0) * len(Q))


def fit_temperature(Q: Array, p: Array) -> float:
    """The T in ``[1/16, 16 MAX_TEMPERATURE]`` whose ``softmax(Q / T)`` is nearest ``p [E]`` in L1."""
    return float(_search(1, _TEMPERATURES, Q, p))
