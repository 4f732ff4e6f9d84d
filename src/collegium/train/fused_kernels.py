"""Kernels of what surrounds the experts in a training step on a CPU: root-mean-square norms, the norm and rotation of
queries and keys, and the loss of logits. Each goes over its numbers once, where torch does up to ten times.

Everything is float32 and computed row by row, in the same order whatever the number of threads; the gradients of
weights are sums over `ITEMS` runs of rows, which the caller adds up.

Legend: n rows of d numbers; T = B * S tokens of H heads with D numbers each, rows of R numbers in memory; y = w x r,
with ``r = 1 / sqrt(mean(x**2) + eps)``, the scale of a row. V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from collegium.experts.compute import cpu_kernels, stored_vectors
from collegium.experts.compute.cpu_kernels import (
    _for_columns,
    _from_lane,
    _load,
    _next,
    _offset,
    _pointer,
    _splat,
    _store,
)
from collegium.experts.compute.jit import LANES, carray, cgutils, intrinsic, njit, types
from collegium.experts.compute.stored_vectors import VECTOR, _exp, compiled, lane_sum, spread

__all__ = ["ITEMS", "LANES", "address"]

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


@njit(fastmath=_SUMS | {"nnan"})
def _largest(z: Any, V: Any) -> Any:
    """Of a row without NaN; of one with some, any number."""
    largest = z[0]
    for k in range(V):
        if z[k] > largest:
            largest = z[k]
    return largest


@intrinsic
def _exponentials(typing: Any, z: Any, length: Any, largest: Any) -> Any:
    """Replace the numbers at address `z`, at least `LANES` of them, by ``exp(z - largest)``; their sum."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        z, length, largest = args
        top, total = spread(b, largest), cgutils.alloca_once_value(b, _splat(0.0, VECTOR))

        def body(i: Any, first: Any) -> None:
            place = _offset(b, z, i, 4)
            before = _load(b, place, 4)
            share = _exp(b, b.fsub(before, top))
            if first is None:
                _store(b, share, place, 4)
            else:  # the lanes before the first new one are done
                share = _from_lane(b, first, share)
                _store(b, b.fadd(share, b.fsub(before, _from_lane(b, first, before))), place, 4)
            b.store(b.fadd(b.load(total), share), total)

        _for_columns(b, length, body)
        return lane_sum(b, b.load(total))

    return types.float32(types.int64, types.int64, types.float32), generate


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


def nats(parameters: Any) -> None:
    """The loss of each row of logits, and its gradient in their place.

    Parameters: counter, n, V, then addresses: logits ``[n, V]``, the target of each row, its nats ``[n]``.
    """
    n, V = parameters[1], parameters[2]
    targets, found = _pointer(parameters[4], V), _row(parameters[5], 0, n)
    while True:
        i = _next(parameters)
        if i >= n:
            break
        z, t = _row(parameters[3], i, V), targets[i]
        largest, chosen = _largest(z, V), z[t]
        total = _exponentials(parameters[3] + i * V * 4, V, largest)
        found[i] = np.log(total) + (largest - chosen)
        scale = np.float32(1) / total
        for k in range(V):
            z[k] *= scale
        z[t] -= np.float32(1)


@functools.cache
def address(name: str) -> int:
    """The address of the compiled kernel `name`: compiled on first use, kept on disk for the next process."""
    return compiled(globals()[name], cpu_kernels, stored_vectors)
