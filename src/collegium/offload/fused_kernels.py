"""Kernels of a decoder layer for one token: what lies before its cache, what lies after it, and the router.

Each is one launch in place of some twenty calls of torch, which at one row take as long as the products. Phases follow
one another as in `stored_one`. Matrices have 8 bits (rows are rounded to 8 bits, too) or are bfloat16 as they are.

Legend: d model width, D head width, r of it turned by rotary positions, H query heads, G key-value heads, E experts.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from collegium.experts.compute import (
    cpu_kernels,
    stored_int8,
    stored_kernels,
    stored_one,
    stored_vectors,
)
from collegium.experts.compute.cpu_kernels import _int, _load, _next, _offset, _pointer, _store
from collegium.experts.compute.jit import LANES, carray, cgutils, intrinsic, njit, types
from collegium.experts.compute.stored_int8 import _rows, round_row
from collegium.experts.compute.stored_kernels import BLOCK, _few, _widen
from collegium.experts.compute.stored_one import _address, _arrive, _wait
from collegium.experts.compute.stored_vectors import I64, compiled, narrow, scratch
from collegium.models import attention_kernel
from collegium.models.attention_kernel import attend_heads, softmax
from collegium.offload import norm
from collegium.offload.norm import norm_row

__all__ = ["MATRIX", "MOST_EXPERTS", "WIDEST", "address"]

WIDEST = 8192
"""Most columns of a matrix: rows have places on the stack."""

MATRIX = 6
"""Numbers of a matrix: rows, weights, scales, bias in bfloat16 or 0, where its result goes in bfloat16, and items."""

MOST_EXPERTS = 1024

_HALF_BYTES, _WIDE_BYTES, _ROUNDED_BYTES, _ONE_SUM = 2 * WIDEST, 4 * WIDEST, 2 * WIDEST, 2 * 64
_ITEM_BYTES = 4 * 1024  # results of an item
_BIAS_BYTES = 4 * BLOCK
_EXPERTS_BYTES = 4 * MOST_EXPERTS


@intrinsic
def _turn(typing: Any, x: Any, r: Any, cos: Any, sin: Any) -> Any:
    """Rotary positions of one head, in place: ``x * cos + rotate_half(x) * sin``, all bfloat16; r: a multiple of
    ``2 * LANES``."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, r, cos, sin = args
        half = b.lshr(r, _int(1))

        def at(base: Any, i: Any) -> Any:
            return _load(b, _offset(b, base, i, 2), 2)

        with cgutils.for_range_slice(b, _int(0), half, _int(LANES), I64) as (i, _):
            j = b.add(i, half)
            first, second = at(x, i), at(x, j)
            left = b.fsub(b.fmul(first, at(cos, i)), b.fmul(second, at(sin, i)))
            right = b.fadd(b.fmul(second, at(cos, j)), b.fmul(first, at(sin, j)))
            _store(b, left, _offset(b, x, i, 2), 2)
            _store(b, right, _offset(b, x, j, 2), 2)
        return context.get_dummy_value()

    return types.void(x, r, cos, sin), generate


@njit
def _block(parameters: Any, at: Any) -> Any:
    return _pointer(_address(parameters) + 8 * at, np.int64(0))


@njit
def _prepare(eight: Any, x: Any, q: Any, wide: Any, rounded: Any, rows: Any) -> None:
    """A bfloat16 row as the products take it; its address goes to the list at `rows`."""
    _widen(np.uint16(0), x, x, 0, q, wide)
    if eight:
        round_row(np.int8(0), 8, wide, q, rounded)
        _pointer(rows, np.int64(0))[0] = rounded
    else:
        _pointer(rows, np.int64(0))[0] = wide


@njit
def _product(eight: Any, a: Any, z: Any, matrix: Any, q: Any, rows: Any, out: Any, sums: Any) -> None:
    """Rows a..z of a matrix times the row that was prepared, in float32."""
    if eight:
        _rows(np.int8(0), 8, 0, a, z, matrix[1], matrix[2], rows, q, out - 4 * a, 0, 1, sums)
    else:
        _few(np.uint16(0), a, z, matrix[1], q * 2, 0, 0, rows, q, out - 4 * a, 0, 1)


@njit
def _settle(a: Any, z: Any, matrix: Any, residual: Any, out: Any, other: Any) -> None:
    """The results of rows a..z with their bias as bfloat16, then with the residual stream added, if there is one."""
    one, half, to = np.float32(1), np.uint16(0), matrix[4]
    added = carray(_pointer(other, one), (BLOCK,))
    for r in range(a, z, BLOCK):
        at = out + 4 * (r - a)
        y = carray(_pointer(at, one), (BLOCK,))
        if matrix[3]:
            _widen(half, matrix[3] + 2 * r, matrix[3] + 2 * r, 0, BLOCK, other)
            for k in range(BLOCK):
                y[k] += added[k]
        narrow(at, one, BLOCK, to + 2 * r)
        if residual:  # torch rounds the product's result before it adds
            _widen(half, to + 2 * r, to + 2 * r, 0, BLOCK, at)
            _widen(half, residual + 2 * r, residual + 2 * r, 0, BLOCK, other)
            for k in range(BLOCK):
                y[k] += added[k]
            narrow(at, one, BLOCK, to + 2 * r)


@njit
def _edges(matrix: Any, item: Any) -> Any:
    blocks = matrix[0] // BLOCK
    return blocks * item // matrix[5] * BLOCK, blocks * (item + 1) // matrix[5] * BLOCK


# ---- before the cache ----------------------------------------------------------------------------------------------
#
# Parameters: counter; items of the three matrices; results of the second phase handed out; items done; d; x ``[d]``;
# weight and bits of the epsilon of its norm; D; r, or 0 without rotary positions; cosines and sines ``[r]``; then for
# queries and for keys: weight of their norm or 0, its width (D or all), bits of its epsilon; then three matrices.

_NORMS, _MATRICES = 12, 18


@njit
def _before(parameters: Any, eight: Any) -> None:
    rows, sums, other = scratch(8), scratch(_ONE_SUM), scratch(_BIAS_BYTES)
    normed, wide, rounded, out = (
        scratch(_HALF_BYTES),
        scratch(_WIDE_BYTES),
        scratch(_ROUNDED_BYTES),
        scratch(_ITEM_BYTES),
    )
    d = parameters[4]
    norm_row(parameters[5], parameters[6], d, parameters[7], normed)
    _prepare(eight, normed, d, wide, rounded, rows)
    done = _block(parameters, 3)
    while True:
        item = _next(parameters)
        if item >= parameters[1]:
            break
        at = _MATRICES
        while item >= parameters[at + 5]:
            item -= parameters[at + 5]
            at += MATRIX
        matrix = _block(parameters, at)
        a, z = _edges(matrix, item)
        _product(eight, a, z, matrix, d, rows, out, sums)
        _settle(a, z, matrix, 0, out, other)
        _arrive(done)
    _wait(done, parameters[1])
    following = _block(parameters, 2)
    while True:
        which = _next(following)
        if which >= 2:
            break
        _place(parameters, _block(parameters, _MATRICES + MATRIX * which), _block(parameters, _NORMS + 3 * which))


@njit
def _place(parameters: Any, matrix: Any, own: Any) -> None:
    """Norm and turn queries or keys, where they lie."""
    p, at, D, r = matrix[0], matrix[4], parameters[8], parameters[9]
    if own[0]:
        for start in range(0, p, own[1]):
            norm_row(at + 2 * start, own[0], own[1], own[2], at + 2 * start)
    if r:
        for start in range(0, p, D):
            _turn(at + 2 * start, r, parameters[10], parameters[11])


def before_8(parameters: Any) -> None:
    _before(parameters, 1)


def before_16(parameters: Any) -> None:
    _before(parameters, 0)


# ---- after the cache -----------------------------------------------------------------------------------------------
#
# Parameters: whether the last phase was taken; items done of the output matrix; d; weight and bits of the epsilon of
# the second norm; residual stream ``[d]``; where its normed sum goes ``[d]``; then counter, columns and matrix of the
# output; then attention's, as `attention_kernel` has them. The sum goes where the matrix's result does.

_OUT, _ATTENTION = 7, 15


@njit
def _after(parameters: Any, eight: Any) -> None:
    rows, sums, other = scratch(8), scratch(_ONE_SUM), scratch(_BIAS_BYTES)
    wide, rounded, out = scratch(_WIDE_BYTES), scratch(_ROUNDED_BYTES), scratch(_ITEM_BYTES)
    attention, counter = _block(parameters, _ATTENTION), _block(parameters, _OUT)
    attend_heads(attention)
    _wait(_block(parameters, _ATTENTION + 16), attention[1])
    matrix, q, done = _block(parameters, _OUT + 2), parameters[_OUT + 1], _block(parameters, 1)
    _prepare(eight, attention[15], q, wide, rounded, rows)
    while True:
        item = _next(counter)
        if item >= matrix[5]:
            break
        a, z = _edges(matrix, item)
        _product(eight, a, z, matrix, q, rows, out, sums)
        _settle(a, z, matrix, parameters[5], out, other)
        _arrive(done)
    _wait(done, matrix[5])
    if _next(parameters) == 0:
        norm_row(matrix[4], parameters[3], parameters[2], parameters[4], parameters[6])


def after_8(parameters: Any) -> None:
    _after(parameters, 1)


def after_16(parameters: Any) -> None:
    _after(parameters, 0)


# ---- the router ----------------------------------------------------------------------------------------------------


def route(parameters: Any) -> None:
    """The K likeliest of E experts: softmax of the logits, which are rounded to bfloat16 first.

    Parameters: counter; items; items done; whether the last phase was taken; E; d; x ``[d]`` and weight ``[E, d]``; K;
    whether the weights of the K are to add up to 1; logits ``[E]``; weights ``[K]`` in float32, ids ``[K]`` in int64.
    Where no type is named it is bfloat16.
    """
    half, one, E, d, K = np.uint16(0), np.float32(1), parameters[4], parameters[5], parameters[8]
    rows, wide, out = scratch(8), scratch(_WIDE_BYTES), scratch(_EXPERTS_BYTES)
    _prepare(0, parameters[6], d, wide, 0, rows)
    done, items = _block(parameters, 2), parameters[1]
    while True:
        item = _next(parameters)
        if item >= items:
            break
        a, z = E // BLOCK * item // items * BLOCK, E // BLOCK * (item + 1) // items * BLOCK
        _few(half, a, z, parameters[7], d * 2, 0, 0, rows, d, out, 0, 1)
        narrow(out + 4 * a, one, z - a, parameters[10] + 2 * a)
        _arrive(done)
    _wait(done, items)
    if _next(_block(parameters, 3)):
        return
    _widen(half, parameters[10], parameters[10], 0, E, out)
    total = softmax(out, E, 0x3F800000)
    shares, weights, ids = _pointer(out, one), _pointer(parameters[11], one), _pointer(parameters[12], np.int64(0))
    kept = np.float32(0)
    for k in range(K):
        best = -1
        for e in range(E):
            free = shares[e] >= 0 or shares[e] != shares[e]  # NaN is chosen, too: who called is to see it
            if free and (best < 0 or shares[e] > shares[best]):
                best = e
        ids[k], weights[k] = best, shares[best] / total
        kept += weights[k]
        shares[best] = np.float32(-1)
    if parameters[9]:
        for k in range(K):
            weights[k] /= kept


@functools.cache
def address(name: str) -> int:
    """The address of the kernel `name` of this file, compiled on first use."""
    others = (cpu_kernels, stored_vectors, stored_kernels, stored_int8, stored_one, attention_kernel, norm)
    return compiled(globals()[name], *others)
