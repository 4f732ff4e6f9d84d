"""Kernels of what surrounds the experts in a training step on a CPU: root-mean-square norms, and the norm and rotation
of queries and keys. Each goes over its numbers once, where torch goes over them some ten times.

Everything is float32 and computed row by row, in the same order whatever the number of threads; the gradients of
weights are sums over `ITEMS` runs of rows, which the caller adds up.

Legend: n rows of d numbers; T = B * S tokens of H heads with D numbers each, rows of R numbers in memory; y = w x r,
with ``r = 1 / sqrt(mean(x**2) + eps)``, the scale of a row.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from collegium.experts.compute import cpu_kernels
from collegium.experts.compute.cpu_kernels import _next, _pointer
from collegium.experts.compute.jit import carray, njit
from collegium.experts.compute.stored_vectors import compiled

__all__ = ["ITEMS", "address"]

ITEMS = 64
"""Runs of rows that threads take one after the other."""

_SUMS = {"reassoc", "contract", "nsz"}
"""What makes a sum over a row a sum of vectors."""


# ---- one row ---------------------------------------------------------------------------------------------------------


@njit(fastmath=_SUMS)
def _scale(x: Any, d: Any, eps: Any) -> Any:
    """The scale of a row."""
    total = np.float32(0)
    for k in range(d):
        total += x[k] * x[k]
    return np.float32(1) / np.sqrt(total / np.float32(d) + eps)


@njit(fastmath=_SUMS)
def _norm_back(x: Any, w: Any, r: Any, grad: Any, d: Any, dx: Any, dw: Any) -> None:
    """``dx``, and what is added to ``dw``, of a row of scale `r` whose ``dy`` is `grad`, which may be `dx` itself."""
    dot = np.float32(0)
    for k in range(d):
        dot += grad[k] * w[k] * x[k]
    back = dot * r * r * r / np.float32(d)
    for k in range(d):
        dw[k] += grad[k] * x[k] * r
        dx[k] = grad[k] * w[k] * r - back * x[k]


@njit(fastmath=_SUMS)
def _rotate(x: Any, w: Any, r: Any, cos: Any, sin: Any, half: Any, out: Any) -> None:
    """A head times its weight `w` and scale `r`, whose two halves are then rotated into each other."""
    for k in range(half):
        first, second = x[k] * r * w[k], x[half + k] * r * w[half + k]
        out[k] = first * cos[k] - second * sin[k]
        out[half + k] = second * cos[half + k] + first * sin[half + k]


@njit(fastmath=_SUMS)
def _rotate_back(grad: Any, cos: Any, sin: Any, half: Any, out: Any) -> None:
    for k in range(half):
        first, second = grad[k], grad[half + k]
        out[k] = first * cos[k] + second * sin[half + k]
        out[half + k] = second * cos[half + k] - first * sin[k]


@njit
def _row(address: Any, number: Any, d: Any) -> Any:
    """Row `number` of rows of `d` numbers."""
    return carray(_pointer(address + number * d * 4, np.float32(1)), (d,))


# ---- kernels ---------------------------------------------------------------------------------------------------------


def norm(parameters: Any) -> None:
    """Parameters: counter, n, d, then addresses: x, w, eps, y, the scales ``[n]``."""
    n, d = parameters[1], parameters[2]
    w, eps, scales = _row(parameters[4], 0, d), _row(parameters[5], 0, 1)[0], _row(parameters[7], 0, n)
    while True:
        item = _next(parameters)
        if item >= ITEMS:
            break
        for i in range(n * item // ITEMS, n * (item + 1) // ITEMS):
            x, y = _row(parameters[3], i, d), _row(parameters[6], i, d)
            r = _scale(x, d, eps)
            scales[i] = r
            for k in range(d):
                y[k] = w[k] * (x[k] * r)


def norm_back(parameters: Any) -> None:
    """Parameters: counter, n, d, then addresses: x, w, the scales ``[n]``, dy, dx, and dw ``[ITEMS, d]``, zeros."""
    n, d = parameters[1], parameters[2]
    w, scales = _row(parameters[4], 0, d), _row(parameters[5], 0, n)
    while True:
        item = _next(parameters)
        if item >= ITEMS:
            break
        dw = _row(parameters[8], item, d)
        for i in range(n * item // ITEMS, n * (item + 1) // ITEMS):
            x, grad, dx = _row(parameters[3], i, d), _row(parameters[6], i, d), _row(parameters[7], i, d)
            _norm_back(x, w, scales[i], grad, d, dx, dw)


def heads(parameters: Any) -> None:
    """Norm, rotate and put in the place that attention reads them from.

    Parameters: counter, B, S, H, D, R, whether there is a norm, numbers from sequence to sequence of cos and sin, then
    addresses: x ``[B, S, R]`` (its first H * D columns), w ``[D]``, eps, cos and sin ``[., S, D]``, out
    ``[B, H, S, D]``, the scales ``[B * S * H]``.
    """
    B, S, H, D = parameters[1], parameters[2], parameters[3], parameters[4]
    w, eps, scales = _row(parameters[9], 0, D), _row(parameters[10], 0, 1)[0], _row(parameters[14], 0, B * S * H)
    while True:
        item = _next(parameters)
        if item >= ITEMS:
            break
        for t in range(B * S * item // ITEMS, B * S * (item + 1) // ITEMS):
            b, s = t // S, t % S
            cos = _row(parameters[11] + b * parameters[7] * 4, s, D)
            sin = _row(parameters[12] + b * parameters[7] * 4, s, D)
            for h in range(H):
                x = _row(parameters[8] + t * parameters[5] * 4, h, D)
                r = _scale(x, D, eps) if parameters[6] else np.float32(1)
                scales[t * H + h] = r
                _rotate(x, w, r, cos, sin, D // 2, _row(parameters[13], (b * H + h) * S + s, D))


def heads_back(parameters: Any) -> None:
    """The way back of `heads`.

    Parameters: as there up to the addresses, which are: x, w, the scales, cos, sin, the gradient of out, dx
    ``[B, S, R]``, dw ``[ITEMS, D]``, zeros; then numbers from sequence to sequence, head to head and token to token of
    the gradient.
    """
    B, S, H, D = parameters[1], parameters[2], parameters[3], parameters[4]
    w, scales = _row(parameters[9], 0, D), _row(parameters[10], 0, B * S * H)
    while True:
        item = _next(parameters)
        if item >= ITEMS:
            break
        dw = _row(parameters[15], item, D)
        for t in range(B * S * item // ITEMS, B * S * (item + 1) // ITEMS):
            b, s = t // S, t % S
            cos = _row(parameters[11] + b * parameters[7] * 4, s, D)
            sin = _row(parameters[12] + b * parameters[7] * 4, s, D)
            for h in range(H):
                place = b * parameters[16] + h * parameters[17] + s * parameters[18]
                x = _row(parameters[8] + t * parameters[5] * 4, h, D)
                dx = _row(parameters[14] + t * parameters[5] * 4, h, D)
                _rotate_back(_row(parameters[13] + place * 4, 0, D), cos, sin, D // 2, dx)
                if parameters[6]:
                    _norm_back(x, w, scales[t * H + h], dx, D, dx, dw)


@functools.cache
def address(name: str) -> int:
    """The address of the compiled kernel `name`: compiled on first use, kept on disk for the next process."""
    return compiled(globals()[name], cpu_kernels)
