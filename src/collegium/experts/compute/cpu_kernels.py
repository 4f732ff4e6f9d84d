"""The CPU kernels: two matrix products with few rows, a weight gradient, and the sum over each token's experts.

Decoding with a mixture of experts reads every weight of the hit experts once and does little with it, so the time is
the time to read memory. The products here read each weight once from memory, in long runs, whatever the number of
rows, and keep sums in registers. LLVM is told the vectors to use (an intrinsic per tile), because its own vectoriser
takes half-width vectors and spills the sums. bfloat16 is widened to float32 in registers: that is exact, and twice as
fast as the bfloat16 instructions of the CPUs we measured (``vdpbf16ps``: 86 against 191 GFLOP/s on a core).

Everything lives in one file because Numba's on-disk cache looks at the age of this file only.

Legend: w one expert's matrix ``[p, q]`` as stored, n rows of the batch that go to this expert, float32. A *kind* is
an example value that tells the element type of w: ``float32(0)``, or ``uint16(0)`` for bfloat16.

    rows_dot      out[n, p]  = x[n, q] @ w.T      reduces along the contiguous side of both
    rows_sum      out[n, q] += s[n, p] @ w        adds p scaled rows of w
    outer         dw[p, q]   = s[n, p].T @ x[n, q]
    combine       y[token[i]] += weight[i] * rows[i]
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from collegium.experts.compute.jit import LANES, WIDE, carray, cfunc, cgutils, intrinsic, ir, missing, njit, types

__all__ = ["HEADER", "MIN_WIDTH", "address"]

HEADER = 8
"""Parameters of a matrix kernel before the list of groups."""

MIN_WIDTH = 16
"""Smallest p and q the kernels take (a tail is one full vector that overlaps its neighbour)."""

# Register tiles. With 32 registers: 6 x 4 sums + 4 of x + 1 of w for the dot products, 4 x 4 for the others.
DOT_ROWS = 6 if WIDE else 2
HALF = DOT_ROWS // 2
TILE = 4 if WIDE else 2
PANEL = 4096  # bytes of a row of w that rows_dot takes at a time: 6 rows of that stay in the first-level cache

if missing is None:
    I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
    VECTOR, VECTOR_I = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


# ---- LLVM fragments ------------------------------------------------------------------------------------------------


def _int(value: int) -> Any:
    return ir.Constant(I64, value)


def _splat(value: Any, kind: Any) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _offset(b: Any, base: Any, count: Any, size: int) -> Any:
    return b.add(base, b.mul(count, _int(size)))


def _load(b: Any, address: Any, size: int) -> Any:
    """LANES floats from memory; `size` 2 widens bfloat16, whose bits are the upper half of a float32."""
    if size == 4:
        value = b.load(b.inttoptr(address, VECTOR.as_pointer()))
        value.align = 4
        return value
    half = b.load(b.inttoptr(address, ir.VectorType(I16, LANES).as_pointer()))
    half.align = 2
    return b.bitcast(b.shl(b.zext(half, VECTOR_I), _splat(16, VECTOR_I)), VECTOR)


def _store(b: Any, value: Any, address: Any, size: int, past_cache: bool = False) -> None:
    """Write LANES floats; `size` 2 rounds to the nearest bfloat16 (ties to even, NaN stays NaN).

    `past_cache` does not read the old content into the cache first, which halves the traffic; for aligned addresses.
    """
    if size == 2:
        bits = b.bitcast(value, VECTOR_I)
        upper = b.lshr(bits, _splat(16, VECTOR_I))
        odd = b.and_(upper, _splat(1, VECTOR_I))
        rounded = b.lshr(b.add(b.add(bits, odd), _splat(0x7FFF, VECTOR_I)), _splat(16, VECTOR_I))
        quiet = b.or_(upper, _splat(0x40, VECTOR_I))
        bits = b.select(b.fcmp_unordered("uno", value, value), quiet, rounded)
        value = b.trunc(bits, ir.VectorType(I16, LANES))
    store = b.store(value, b.inttoptr(address, value.type.as_pointer()))
    store.align = LANES * size if past_cache else size
    if past_cache:
        store.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))


def _broadcast(b: Any, address: Any) -> Any:
    scalar = b.load(b.inttoptr(address, F32.as_pointer()))
    undefined = ir.Constant(VECTOR, ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, _splat(0, VECTOR_I))


def _add_product(b: Any, total: Any, x: Any, y: Any) -> Any:
    return b.fadd(total, b.fmul(x, y, flags=("contract",)), flags=("contract",))


def _from_lane(b: Any, first: Any, value: Any) -> Any:
    """`value` with the lanes before `first` set to zero."""
    lane = ir.Constant(VECTOR_I, list(range(LANES)))
    start = b.insert_element(ir.Constant(VECTOR_I, ir.Undefined), b.trunc(first, I32), ir.Constant(I32, 0))
    start = b.shuffle_vector(start, ir.Constant(VECTOR_I, ir.Undefined), _splat(0, VECTOR_I))
    return b.select(b.icmp_signed(">=", lane, start), value, _splat(0.0, VECTOR))


def _prefetch(b: Any, address: Any) -> None:
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    read, second_level, data = ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)
    b.call(function, [b.inttoptr(address, pointer), read, second_level, data])


def _for_columns(b: Any, length: Any, body: Any) -> None:
    """`body(i, first_new_lane)` for every vector of a row; a remainder becomes one vector that ends with the row."""
    rest = b.and_(length, _int(LANES - 1))
    with cgutils.for_range_slice(b, _int(0), b.sub(length, rest), _int(LANES), I64) as (i, _):
        body(i, None)
    with b.if_then(b.icmp_signed("!=", rest, _int(0))):
        body(b.sub(length, _int(LANES)), b.sub(_int(LANES), rest))


def _size(kind: Any) -> int:
    return 4 if kind == types.float32 else 2


# ---- tiles ---------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def _dot_tile(
    typing: Any, p: Any, n: Any, fetch: Any, kind: Any,
    w: Any, x: Any, q: Any, length: Any, out: Any, stride: Any, more: Any, ahead: Any,
) -> Any:  # fmt: skip
    """``out[c, r] (+)= w[r] . x[c]`` for p rows of w and n of x, q apart, over `length` columns; + if `more`.

    On the way it fetches `fetch` rows from `ahead` into the cache: otherwise arithmetic and memory would take turns.
    """
    P, N, size = p.literal_value, n.literal_value, _size(kind)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        w, x, q, length, out, stride, more, ahead = args[4:]
        sums = [[cgutils.alloca_once_value(b, _splat(0.0, VECTOR)) for _ in range(N)] for _ in range(P)]
        w_rows = [_offset(b, w, q, size * r) for r in range(P)]
        x_rows = [_offset(b, x, q, 4 * c) for c in range(N)]
        ahead_rows = [_offset(b, ahead, q, size * r) for r in range(fetch.literal_value)]

        def body(i: Any, first: Any) -> None:
            xs = [_load(b, _offset(b, row, i, 4), 4) for row in x_rows]
            if first is not None:
                xs = [_from_lane(b, first, value) for value in xs]
            for row in ahead_rows:
                _prefetch(b, _offset(b, row, i, size))
            for r in range(P):
                value = _load(b, _offset(b, w_rows[r], i, size), size)
                for c in range(N):
                    b.store(_add_product(b, b.load(sums[r][c]), value, xs[c]), sums[r][c])

        _for_columns(b, length, body)
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        reduce = cgutils.get_or_insert_function(b.module, ir.FunctionType(F32, [F32, VECTOR]), name)
        fresh = b.icmp_signed("==", more, _int(0))
        zero = ir.Constant(F32, 0.0)
        for c in range(N):
            row = _offset(b, out, stride, 4 * c)
            for r in range(P):
                total = b.call(reduce, [zero, b.load(sums[r][c])], fastmath=("reassoc",))
                place = b.inttoptr(b.add(row, _int(4 * r)), F32.as_pointer())
                b.store(b.fadd(total, b.select(fresh, zero, b.load(place))), place)
        return context.get_dummy_value()

    return types.void(p, n, fetch, kind, *[types.intp] * 8), generate


@intrinsic(prefer_literal=True)
def _sum_tile(
    typing: Any, p: Any, n: Any, kind: Any, w: Any, q: Any, s: Any, stride: Any, length: Any, out: Any, ahead: Any
) -> Any:
    """``out[i] += sum over r of s[i, r] * w[r]`` for p rows of w and n of out, q apart, over `length` columns.

    It fetches p rows from `ahead` on the way, too.
    """
    P, N, size = p.literal_value, n.literal_value, _size(kind)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        w, q, s, stride, length, out, ahead = args[3:]
        scale = [[_broadcast(b, b.add(_offset(b, s, stride, 4 * i), _int(4 * r))) for r in range(P)] for i in range(N)]
        w_rows = [_offset(b, w, q, size * r) for r in range(P)]
        out_rows = [_offset(b, out, q, 4 * i) for i in range(N)]
        ahead_rows = [_offset(b, ahead, q, size * r) for r in range(P)]

        def body(i: Any, first: Any) -> None:
            values = [_load(b, _offset(b, row, i, size), size) for row in w_rows]
            if first is not None:
                values = [_from_lane(b, first, value) for value in values]
            for row in ahead_rows:
                _prefetch(b, _offset(b, row, i, size))
            for j in range(N):
                place = _offset(b, out_rows[j], i, 4)
                total = _load(b, place, 4)
                for r in range(P):
                    total = _add_product(b, total, values[r], scale[j][r])
                _store(b, total, place, 4)

        _for_columns(b, length, body)
        return context.get_dummy_value()

    return types.void(p, n, kind, *[types.intp] * 7), generate


@intrinsic(prefer_literal=True)
def _outer_tile(
    typing: Any, p: Any, vectors: Any, aligned: Any, kind: Any, s: Any, stride: Any, x: Any, q: Any, n: Any, dw: Any
) -> Any:
    """``dw[r, :] = sum over n rows of s[a, r] * x[a, :]`` for p rows of dw, `vectors` vectors wide, q apart."""
    P, J, size = p.literal_value, vectors.literal_value, _size(kind)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        s, stride, x, q, n, dw = args[4:]
        sums = [[cgutils.alloca_once_value(b, _splat(0.0, VECTOR)) for _ in range(J)] for _ in range(P)]
        with cgutils.for_range(b, n) as loop:
            x_row = _offset(b, x, b.mul(q, loop.index), 4)
            s_row = _offset(b, s, b.mul(stride, loop.index), 4)
            xs = [_load(b, b.add(x_row, _int(4 * LANES * j)), 4) for j in range(J)]
            for r in range(P):
                scale = _broadcast(b, b.add(s_row, _int(4 * r)))
                for j in range(J):
                    b.store(_add_product(b, b.load(sums[r][j]), xs[j], scale), sums[r][j])
        for r in range(P):
            row = _offset(b, dw, q, size * r)
            for j in range(J):
                _store(b, b.load(sums[r][j]), b.add(row, _int(size * LANES * j)), size, bool(aligned.literal_value))
        return context.get_dummy_value()

    return types.void(p, vectors, aligned, kind, *[types.intp] * 6), generate


@intrinsic
def _next(typing: Any, counter: Any) -> Any:
    """Take the next number from the counter that all threads share."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", args[0], _int(1), "monotonic")

    return types.int64(counter), generate


@intrinsic
def _pointer(typing: Any, address: Any, kind: Any) -> Any:
    """A pointer to values of the type of `kind`."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.inttoptr(args[0], args[1].type.as_pointer())

    return types.CPointer(kind)(address, kind), generate


# ---- kernels -------------------------------------------------------------------------------------------------------
#
# Every thread runs the kernel and takes item after item until none is left, so a thread that the system interrupts
# does less, and the result does not depend on who computed what. The first parameter is the shared counter. A matrix
# kernel has HEADER parameters (counter, items, splits, p, q, and the addresses of w and of two row matrices) and three
# numbers for each group: the expert and its first and last row. An item is one of `splits` slices of one group.


@njit
def _take(parameters: Any) -> Any:
    """The next item: expert, first row, last row, slice. The expert is -1 when none is left."""
    item = _next(parameters)
    if item >= parameters[1]:
        return -1, 0, 0, 0
    group = HEADER + 3 * (item // parameters[2])
    return parameters[group], parameters[group + 1], parameters[group + 2], item % parameters[2]


@njit
def _tokens_dot(kind: Any, size: Any, p0: Any, p1: Any, q: Any, w: Any, x: Any, out: Any, stride: Any, n: Any) -> None:
    """Rows p0..p1 of w with all n rows of x. The last tile overlaps the one before it: same sums, written twice."""
    panel = PANEL // size
    for start in range(p0, p1, DOT_ROWS):
        r = min(start, p1 - DOT_ROWS)
        for k in range(0, q, panel):
            length = min(panel, q - k)
            if length < LANES:  # a tail needs a full vector before its end
                continue
            if q - k - length < LANES:
                length = q - k
            w_at, x_at, out_at = w + (r * q + k) * size, x + k * 4, out + r * 4
            ahead, half = w_at + DOT_ROWS * q * size, HALF * q * size
            c = 0
            while c < n:
                x_c, out_c, left = x_at + c * q * 4, out_at + c * stride * 4, n - c
                # the first tile fetches the next rows of w, or the first two tiles half of them each
                fetch = w_at if c >= 8 else ahead + (half if c >= 4 else 0)
                if left >= 4 and n >= 8:
                    _dot_tile(DOT_ROWS, 4, HALF, kind, w_at, x_c, q, length, out_c, stride, k, fetch)
                    c += 4
                elif left >= 4:
                    _dot_tile(DOT_ROWS, 4, DOT_ROWS, kind, w_at, x_c, q, length, out_c, stride, k, fetch)
                    c += 4
                elif left >= 2:
                    _dot_tile(DOT_ROWS, 2, DOT_ROWS, kind, w_at, x_c, q, length, out_c, stride, k, fetch)
                    c += 2
                else:
                    _dot_tile(DOT_ROWS, 1, DOT_ROWS, kind, w_at, x_c, q, length, out_c, stride, k, fetch)
                    c += 1


@njit
def _rows_dot(parameters: Any, kind: Any, size: Any) -> None:
    splits, p, q = parameters[2], parameters[3], parameters[4]
    w, x, out = parameters[5], parameters[6], parameters[7]
    while True:
        expert, first, last, part = _take(parameters)
        if expert < 0:
            break
        p0 = p // DOT_ROWS * part // splits * DOT_ROWS
        p1 = p if part + 1 == splits else p // DOT_ROWS * (part + 1) // splits * DOT_ROWS
        _tokens_dot(
            kind, size, p0, p1, q, w + expert * p * q * size, x + first * q * 4, out + first * p * 4, p, last - first
        )


@njit
def _tokens_sum(kind: Any, size: Any, p: Any, length: Any, q: Any, w: Any, s: Any, out: Any, n: Any) -> None:
    for r in range(0, p - p % 4, 4):
        w_at, i = w + r * q * size, 0
        while i < n:
            s_i, out_i, left = s + (i * p + r) * 4, out + i * q * 4, n - i
            ahead = w_at if i else w_at + 4 * q * size
            if left >= TILE:
                _sum_tile(4, TILE, kind, w_at, q, s_i, p, length, out_i, ahead)
                i += TILE
            elif left >= 2:
                _sum_tile(4, 2, kind, w_at, q, s_i, p, length, out_i, ahead)
                i += 2
            else:
                _sum_tile(4, 1, kind, w_at, q, s_i, p, length, out_i, ahead)
                i += 1
    for r in range(p - p % 4, p):
        for i in range(n):
            w_at = w + r * q * size
            _sum_tile(1, 1, kind, w_at, q, s + (i * p + r) * 4, p, length, out + i * q * 4, w_at)


@njit
def _rows_sum(parameters: Any, kind: Any, size: Any) -> None:
    splits, p, q = parameters[2], parameters[3], parameters[4]
    w, s, out = parameters[5], parameters[6], parameters[7]
    while True:
        expert, first, last, part = _take(parameters)
        if expert < 0:
            break
        q0 = q * part // splits // LANES * LANES
        q1 = q if part + 1 == splits else q * (part + 1) // splits // LANES * LANES
        _tokens_sum(
            kind, size, p, q1 - q0, q, w + (expert * p * q + q0) * size, s + first * p * 4, out + (first * q + q0) * 4,
            last - first,
        )  # fmt: skip


@njit
def _outer(parameters: Any, kind: Any, size: Any) -> None:
    splits, p, q = parameters[2], parameters[3], parameters[4]
    dw, s, x = parameters[5], parameters[6], parameters[7]
    wide, narrow = 4 * LANES, LANES
    aligned = dw % (LANES * size) == 0 and q % LANES == 0
    while True:
        expert, first, last, part = _take(parameters)
        if expert < 0:
            break
        p0, p1 = p * part // splits, p * (part + 1) // splits
        for start in range(p0, p1, TILE):
            r = min(start, p1 - TILE)
            s_at, x_at, n = s + (first * p + r) * 4, x + first * q * 4, last - first
            out = dw + (expert * p + r) * q * size
            c = 0
            while c + wide <= q:
                if aligned:
                    _outer_tile(TILE, 4, 1, kind, s_at, p, x_at + c * 4, q, n, out + c * size)
                else:
                    _outer_tile(TILE, 4, 0, kind, s_at, p, x_at + c * 4, q, n, out + c * size)
                c += wide
            while c < q:
                c = min(c, q - narrow)
                _outer_tile(TILE, 1, 0, kind, s_at, p, x_at + c * 4, q, n, out + c * size)
                c += narrow


def combine(parameters: Any) -> None:
    """Parameters: counter, items, d, number of rows, token of each row, weight of each row or 0, rows, y.

    An item is a slice of the columns for all rows: no two threads write the same place, and the order of the sum is
    the order of the rows.
    """
    one = np.float32(1)
    items, d, n, weighted = parameters[1], parameters[2], parameters[3], parameters[5] != 0
    token, weight = _pointer(parameters[4], d), _pointer(parameters[5], one)
    while True:
        item = _next(parameters)
        if item >= items:
            break
        first, last = d * item // items, d * (item + 1) // items
        for i in range(n):
            scale = weight[i] if weighted else one
            source = carray(_pointer(parameters[6] + (i * d + first) * 4, one), (last - first,))
            y = carray(_pointer(parameters[7] + (token[i] * d + first) * 4, one), (last - first,))
            for k in range(last - first):
                y[k] += scale * source[k]


def rows_dot_float32(parameters: Any) -> None:
    _rows_dot(parameters, np.float32(0), 4)


def rows_dot_bfloat16(parameters: Any) -> None:
    _rows_dot(parameters, np.uint16(0), 2)


def rows_sum_float32(parameters: Any) -> None:
    _rows_sum(parameters, np.float32(0), 4)


def rows_sum_bfloat16(parameters: Any) -> None:
    _rows_sum(parameters, np.uint16(0), 2)


def outer_float32(parameters: Any) -> None:
    _outer(parameters, np.float32(0), 4)


def outer_bfloat16(parameters: Any) -> None:
    _outer(parameters, np.uint16(0), 2)


@functools.cache
def address(name: str) -> int:
    """The address of the compiled kernel `name`: compiled on first use, kept on disk for the next process."""
    return cfunc(types.void(types.CPointer(types.int64)), cache=True)(globals()[name]).address
