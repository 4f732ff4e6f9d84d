"""Kernels of attention over short sequences in a training step on a CPU: a few query rows at a time see the keys that
they may, with scores in the cache, and the way back computes the scores anew.

All that is summed is float32 and summed in one order, whatever the number of threads: an item is a sequence and a
key-value head with all its query heads.

Legend: B sequences, S positions, G key-value heads, n query heads of each, D numbers of a head. A place is an address;
strides are in numbers (of four bytes).

    P = softmax(scale q k')       y = P v
    dv += P' dy                   dS = scale P (dy v' - rowsum(P dy v'))        dq = dS k        dk += dS' q
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from collegium.experts.compute import cpu_kernels, stored_vectors
from collegium.experts.compute.cpu_kernels import (
    TILE,
    _add_product,
    _broadcast,
    _int,
    _load,
    _next,
    _offset,
    _pointer,
    _splat,
    _store,
)
from collegium.experts.compute.jit import LANES, carray, cgutils, intrinsic, njit, types
from collegium.experts.compute.stored_vectors import VECTOR, compiled
from collegium.models import attention_kernel
from collegium.models.attention_kernel import softmax
from collegium.train import fused_kernels
from collegium.train.fused_kernels import _SUMS, _row

__all__ = ["BLOCK", "address", "scratch_floats"]

BLOCK = 32
"""Query rows whose scores are in memory at a time."""
WIDE = 4 * LANES


def scratch_floats(S: int, D: int) -> int:
    """Numbers that a thread needs beside its arguments."""
    return 2 * S * D + 2 * BLOCK * S + 4 * S


# ---- products --------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def _product_tile(
    typing: Any, rows: Any, vectors: Any, s: Any, s_row: Any, s_next: Any, x: Any, x_row: Any, n: Any, out: Any,
    out_row: Any, more: Any,
) -> Any:  # fmt: skip
    """``out[i] (+)= sum over a < n of s[i, a] x[a]`` for `rows` rows, `vectors` vectors wide; + if `more`. The numbers
    of s are `s_row` apart from row to row and `s_next` along a row."""
    R, J = rows.literal_value, vectors.literal_value

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        s, s_row, s_next, x, x_row, n, out, out_row, more = args[2:]
        fresh = b.icmp_signed("==", more, _int(0))
        places = [[b.add(_offset(b, out, out_row, 4 * i), _int(4 * LANES * j)) for j in range(J)] for i in range(R)]
        zero = _splat(0.0, VECTOR)
        sums = [[cgutils.alloca_once(b, VECTOR) for _ in range(J)] for _ in range(R)]
        with b.if_else(fresh) as (new, old):
            with new:
                for row in sums:
                    for one in row:
                        b.store(zero, one)
            with old:
                for row, at in zip(sums, places, strict=True):
                    for one, place in zip(row, at, strict=True):
                        b.store(_load(b, place, 4), one)
        s_rows = [_offset(b, s, s_row, 4 * i) for i in range(R)]
        with cgutils.for_range(b, n) as loop:
            x_at = _offset(b, x, b.mul(x_row, loop.index), 4)
            xs = [_load(b, b.add(x_at, _int(4 * LANES * j)), 4) for j in range(J)]
            along = b.mul(s_next, loop.index)
            for i in range(R):
                scale = _broadcast(b, _offset(b, s_rows[i], along, 4))
                for j in range(J):
                    b.store(_add_product(b, b.load(sums[i][j]), xs[j], scale), sums[i][j])
        for row, at in zip(sums, places, strict=True):
            for one, place in zip(row, at, strict=True):
                _store(b, b.load(one), place, 4)
        return context.get_dummy_value()

    return types.void(rows, vectors, *[types.intp] * 9), generate


@njit
def _product(s: Any, s_row: Any, s_next: Any, x: Any, x_row: Any, n: Any, out: Any, out_row: Any, width: Any,
             more: Any) -> None:  # fmt: skip
    """`TILE` rows of ``out (+)= s x``, `width` numbers wide, a multiple of `LANES`."""
    c = 0
    while c + WIDE <= width:
        _product_tile(TILE, 4, s, s_row, s_next, x + c * 4, x_row, n, out + c * 4, out_row, more)
        c += WIDE
    while c < width:
        _product_tile(TILE, 1, s, s_row, s_next, x + c * 4, x_row, n, out + c * 4, out_row, more)
        c += LANES


@njit
def _transpose(rows: Any, row: Any, S: Any, D: Any, out: Any) -> None:
    """``[S, D]`` rows, `row` apart, as ``[D, S]``."""
    columns = _row(out, 0, S * D)
    for i in range(S):
        one = _row(rows + i * row * 4, 0, D)
        for k in range(D):
            columns[k * S + i] = one[k]


# ---- scores ----------------------------------------------------------------------------------------------------------


@njit
def _ranges(mask: Any, S: Any, out: Any) -> None:
    """For every `TILE` rows the first key that one of them may see and the one after the last, multiples of `LANES`.

    `mask` is the place of the bytes ``[S, S]`` of a sequence, or 0 where keys up to a row's own are seen.
    """
    ranges = carray(_pointer(out, np.int64(1)), (S // TILE, 2))
    for tile in range(S // TILE):
        low, high = np.int32(0), np.int32(tile * TILE + TILE)
        if mask != 0:
            low, high = np.int32(S), np.int32(0)
            allowed = carray(_pointer(mask + tile * TILE * S, np.uint8(1)), (TILE, S))
            for i in range(TILE):
                for k in range(S):
                    low = min(low, np.int32(k) if allowed[i, k] else np.int32(S))
                    high = max(high, np.int32(k + 1) if allowed[i, k] else np.int32(0))
        ranges[tile, 0] = low // LANES * LANES
        ranges[tile, 1] = -(-high // LANES) * LANES


@njit
def _range(ranges: Any, S: Any, first: Any, last: Any) -> Any:
    """The range of keys of rows `first` to `last`."""
    tiles = carray(_pointer(ranges, np.int64(1)), (S // TILE, 2))
    low, high = tiles[first // TILE, 0], tiles[first // TILE, 1]
    for tile in range(first // TILE + 1, last // TILE):
        low, high = min(low, tiles[tile, 0]), max(high, tiles[tile, 1])
    return low, high


@njit
def _allow(mask: Any, S: Any, i: Any, low: Any, high: Any, scores: Any) -> Any:
    """Set the scores of row i for keys `low` to `high` that it may not see to -inf. How many it may see."""
    row = _row(scores, 0, high - low)
    if mask == 0:
        for k in range(max(i + 1, low), high):
            row[k - low] = -np.inf
        return i + 1 - low
    allowed = carray(_pointer(mask + i * S + low, np.uint8(1)), (high - low,))
    some = np.int32(0)
    for k in range(high - low):
        some += np.int32(allowed[k])
        row[k] = row[k] if allowed[k] else np.float32(-np.inf)
    return some


@njit
def _erase(mask: Any, S: Any, i: Any, low: Any, high: Any, place: Any) -> None:
    """Set the probabilities of keys that row i may not see to 0, of which the kernels' exponential stops short."""
    row = _row(place, 0, high - low)
    if mask == 0:
        for k in range(max(i + 1, low), high):
            row[k - low] = np.float32(0)
    else:
        allowed = carray(_pointer(mask + i * S + low, np.uint8(1)), (high - low,))
        for k in range(high - low):
            row[k] *= np.float32(allowed[k])


@njit
def _fill(place: Any, length: Any) -> None:
    row = _row(place, 0, length)
    for k in range(length):
        row[k] = np.float32(0)


@njit
def _scale(place: Any, length: Any, factor: Any) -> None:
    row = _row(place, 0, length)
    for k in range(length):
        row[k] *= factor


@njit
def _probabilities(q: Any, q_row: Any, keys: Any, mask: Any, S: Any, D: Any, bits: Any, i: Any, low: Any, high: Any,
                   out: Any) -> None:  # fmt: skip
    """Rows i to i + TILE of P over keys `low` to `high`, S apart; `keys` are ``[D, S]``."""
    _product(q + i * q_row * 4, q_row, 1, keys + low * 4, S, D, out, S, high - low, 0)
    for r in range(TILE):
        place = out + r * S * 4
        if _allow(mask, S, i + r, low, high, place) > 0:
            total = softmax(place, high - low, bits)
            _scale(place, high - low, np.float32(1) / total)
            _erase(mask, S, i + r, low, high, place)
        else:
            _fill(place, high - low)


@njit(fastmath=_SUMS)
def _scores_back(p: Any, grad: Any, length: Any, scale: Any) -> None:
    """From the gradient of probabilities to that of the unscaled scores, in place."""
    total = np.float32(0)
    for k in range(length):
        total += p[k] * grad[k]
    for k in range(length):
        grad[k] = p[k] * (grad[k] - total) * scale


# ---- kernels ---------------------------------------------------------------------------------------------------------
#
# Parameters of both: counter, B, S, G, n, D, bits of the scale, place of the scale, places of the mask ``[B, S, S]`` or
# 0, of a counter of threads, and of the scratch memory, numbers of it for a thread; then q, k and v, each as place and
# numbers from sequence to sequence, head to head and row to row.


@njit
def _memory(parameters: Any) -> Any:
    """Places in the scratch memory of this thread: keys, values, rows of P and of its gradient, ranges of keys."""
    S, D = parameters[2], parameters[5]
    keys = parameters[10] + _next(_pointer(parameters[9], np.int64(1))) * parameters[11] * 4
    p = keys + 2 * S * D * 4
    return keys, keys + S * D * 4, p, p + BLOCK * S * 4, p + 2 * BLOCK * S * 4


@njit
def _place(parameters: Any, at: Any, b: Any, h: Any) -> Any:
    """Where head h of sequence b of the tensor begins whose place is parameter `at`."""
    return parameters[at] + (b * parameters[at + 1] + h * parameters[at + 2]) * 4


def attend(parameters: Any) -> None:
    """Then y, as q."""
    S, G, n, D, bits = parameters[2], parameters[3], parameters[4], parameters[5], parameters[6]
    keys, _, p, _, ranges = _memory(parameters)
    while True:
        item = _next(parameters)
        if item >= parameters[1] * G:
            break
        b, g = item // G, item % G
        mask = parameters[8] + b * S * S if parameters[8] else 0
        _ranges(mask, S, ranges)
        _transpose(_place(parameters, 16, b, g), parameters[19], S, D, keys)
        v, v_row = _place(parameters, 20, b, g), parameters[23]
        for h in range(g * n, g * n + n):
            q, y, y_row = _place(parameters, 12, b, h), _place(parameters, 24, b, h), parameters[27]
            for i in range(0, S, TILE):
                low, high = _range(ranges, S, i, i + TILE)
                _probabilities(q, parameters[15], keys, mask, S, D, bits, i, low, high, p)
                _product(p, S, 1, v + low * v_row * 4, v_row, high - low, y + i * y_row * 4, y_row, D, 0)


def attend_back(parameters: Any) -> None:
    """Then dy, dq, dk and dv, as q; dk and dv are zeros."""
    S, G, n, D = parameters[2], parameters[3], parameters[4], parameters[5]
    memory = _memory(parameters)
    while True:
        item = _next(parameters)
        if item >= parameters[1] * G:
            break
        b, g = item // G, item % G
        mask = parameters[8] + b * S * S if parameters[8] else 0
        _ranges(mask, S, memory[4])
        _transpose(_place(parameters, 16, b, g), parameters[19], S, D, memory[0])
        _transpose(_place(parameters, 20, b, g), parameters[23], S, D, memory[1])
        for h in range(g * n, g * n + n):
            for first in range(0, S, BLOCK):
                _block_back(parameters, b, g, h, mask, first, min(first + BLOCK, S), memory)


@njit
def _block_back(parameters: Any, b: Any, g: Any, h: Any, mask: Any, first: Any, last: Any, memory: Any) -> None:
    """The way back of query rows `first` to `last` of head h."""
    S, D, bits, scale = parameters[2], parameters[5], parameters[6], _row(parameters[7], 0, 1)[0]
    keys, values, p, grad, ranges = memory
    q, q_row, k, k_row = _place(parameters, 12, b, h), parameters[15], _place(parameters, 16, b, g), parameters[19]
    dy, dy_row, dq, dq_row = _place(parameters, 24, b, h), parameters[27], _place(parameters, 28, b, h), parameters[31]
    dk, dk_row, dv, dv_row = _place(parameters, 32, b, g), parameters[35], _place(parameters, 36, b, g), parameters[39]
    low, high = _range(ranges, S, first, last)
    for i in range(first, last, TILE):
        start, stop = _range(ranges, S, i, i + TILE)
        at = ((i - first) * S + start - low) * 4
        _probabilities(q, q_row, keys, mask, S, D, bits, i, start, stop, p + at)
        _product(dy + i * dy_row * 4, dy_row, 1, values + start * 4, S, D, grad + at, S, stop - start, 0)
        for r in range(TILE):
            place = at + r * S * 4
            _scores_back(_row(p + place, 0, stop - start), _row(grad + place, 0, stop - start), stop - start, scale)
            for rows in (p, grad):
                _fill(rows + place - (start - low) * 4, start - low)
                _fill(rows + place + (stop - start) * 4, high - stop)
        _product(grad + at, S, 1, k + start * k_row * 4, k_row, stop - start, dq + i * dq_row * 4, dq_row, D, 0)
    for c in range(low, high, TILE):
        # where keys up to a row's own are seen, the rows before the key have nothing for it
        start = max(first, c) if mask == 0 else first
        at, rows = ((start - first) * S + c - low) * 4, last - start
        _product(p + at, 1, S, dy + start * dy_row * 4, dy_row, rows, dv + c * dv_row * 4, dv_row, D, 1)
        _product(grad + at, 1, S, q + start * q_row * 4, q_row, rows, dk + c * dk_row * 4, dk_row, D, 1)


@functools.cache
def address(name: str) -> int:
    """The address of the compiled kernel `name`: compiled on first use, kept on disk for the next process."""
    return compiled(globals()[name], cpu_kernels, stored_vectors, attention_kernel, fused_kernels)
