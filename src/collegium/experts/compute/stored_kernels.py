"""CPU kernels that multiply rows of float32 with weights as they are stored: 32, 16, 8 or 4 bits each.

The codes are widened in registers, and each weight is read from memory once for up to `CHUNK` rows. Codes of 4 bits
take more work, so beyond `FEW` rows a strip of them is first widened into a small buffer on the stack; no matrix of
float32 is ever written to memory. The order of every sum depends only on the number of rows of a group: not on the
threads, the slices or the other groups.

Legend: one matrix ``[p, q]``, u rows of `up`, f rows of `down`'s input; a *group* is the address of a record and the
first and last of its rows. A *kind* is an example value whose type says how weights are stored, one of `KINDS`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from collegium.experts.compute import cpu_kernels, stored_vectors
from collegium.experts.compute.cpu_kernels import _int, _load, _next, _offset, _pointer, _splat, _store
from collegium.experts.compute.jit import WIDE, carray, cgutils, intrinsic, ir, njit, types
from collegium.experts.compute.stored_vectors import (
    F32,
    I64,
    KINDS,
    VECTOR,
    activate,
    codes,
    columns,
    compiled,
    fma,
    group_scale,
    lane_sum,
    read,
    scratch,
)

__all__ = ["ACTIVATIONS", "BLOCK", "CHUNK", "HEADER", "ITEM_ROWS", "address"]

HEADER = 14
"""Parameters of a product before its groups: see `_product`."""

BLOCK = 16
"""Rows of a matrix are handed out in multiples of this many, and q is a multiple of it."""

ITEM_ROWS = 192
"""Rows of a matrix that a thread takes at a time: long runs are read fast, and there are enough of them."""

CHUNK = 64
"""Most rows of x that one pass over a matrix serves."""

ACTIVATIONS = {"silu": 1, "gelu_pytorch_tanh": 2, "relu": 3, "relu2": 4}
"""Activations that a kernel applies itself, by their number in its parameters."""

FEW = 4  # most rows that codes of 4 bits are widened in registers for
PANEL = 1024  # columns of a strip of widened weights: 4 rows of it are half of the first-level cache
MANY = 6 if WIDE else 2  # rows of x in the tile of a strip: 4 x 6 sums, 6 of x and one of w fill 32 registers
LIST_BYTES = 8 * CHUNK
PANEL_BYTES = 4 * PANEL * 4


# ---- tiles ---------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def _dot_tile(
    typing: Any, p: Any, n: Any, fetch: Any, kind: Any,
    w: Any, stride: Any, scale: Any, x_rows: Any, k: Any, length: Any, out: Any, out_stride: Any,
) -> Any:  # fmt: skip
    """``out[c, r] (+)= w[r] . x[c]`` for p rows of w and the n rows of x that `x_rows` points to, from column k on.

    It adds where k is not 0. `fetch`: fetch the next p rows of w into the cache on the way. The scales of 8 bits are
    one float of each row, those of 4 bits ``q / group`` halves.
    """
    P, N, (B, G) = p.literal_value, n.literal_value, KINDS[kind]

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        w, stride, scale, x_rows, k, length, out, out_stride = args[4:]
        sums = [[cgutils.alloca_once_value(b, _splat(0.0, VECTOR)) for _ in range(N)] for _ in range(P)]
        rows = [b.add(w, b.mul(stride, _int(r))) for r in range(P)]
        xs = [b.add(read(b, b.add(x_rows, _int(8 * c)), I64, 8), b.mul(k, _int(4))) for c in range(N)]
        scales = [b.add(scale, b.mul(b.udiv(stride, _int(G // 4)), _int(r))) for r in range(P)] if G else []
        ahead = [b.add(row, b.mul(stride, _int(P))) for row in rows] if fetch.literal_value else []

        def body(i: Any) -> None:
            for r in range(P):
                vectors = codes(b, B, G, rows[r], i)
                factor = group_scale(b, scales[r], i, G) if G else None
                for c in range(N):
                    total = None if G else b.load(sums[r][c])
                    for after, vector in vectors:
                        x = _load(b, _offset(b, xs[c], b.add(i, _int(after)), 4), 4)
                        total = b.fmul(vector, x) if total is None else fma(b, vector, x, total)
                    b.store(fma(b, total, factor, b.load(sums[r][c])) if G else total, sums[r][c])

        columns(b, B, G, length, body, ahead)
        fresh, zero = b.icmp_signed("==", k, _int(0)), ir.Constant(F32, 0.0)
        for c in range(N):
            for r in range(P):
                total = lane_sum(b, b.load(sums[r][c]))
                if B == 8:
                    total = b.fmul(total, read(b, b.add(scale, _int(4 * r)), F32, 4))
                place = b.inttoptr(b.add(b.add(out, b.mul(out_stride, _int(c))), _int(4 * r)), F32.as_pointer())
                b.store(b.fadd(total, b.select(fresh, zero, b.load(place))), place)
        return context.get_dummy_value()

    return types.void(p, n, fetch, kind, *[types.intp] * 8), generate


@intrinsic(prefer_literal=True)
def _widen(typing: Any, kind: Any, w: Any, ahead: Any, scale: Any, length: Any, out: Any) -> Any:
    """`length` weights of one row as float32 to `out`, times the scales of their groups, which begin at `scale`."""
    B, G = KINDS[kind]

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        w, ahead, scale, length, out = args[1:]

        def body(i: Any) -> None:
            factor = group_scale(b, scale, i, G) if G else None
            for after, vector in codes(b, B, G, w, i):
                value = b.fmul(vector, factor) if G else vector
                _store(b, value, _offset(b, out, b.add(i, _int(after)), 4), 4)

        columns(b, B, G, length, body, [ahead])
        return context.get_dummy_value()

    return types.void(kind, *[types.intp] * 5), generate


# ---- kernels -------------------------------------------------------------------------------------------------------
#
# As in `cpu_kernels`, every thread takes item after item; an item is a slice of the rows of one group's matrix.


@njit
def _few(kind: Any, r0: Any, r1: Any, w: Any, stride: Any, scale: Any, per_row: Any,
         x_rows: Any, q: Any, out: Any, out_stride: Any, n: Any) -> None:  # fmt: skip
    for start in range(r0, r1, 8):
        r = min(start, r1 - 8)
        if n == 1:
            _dot_tile(8, 1, 1, kind, w + r * stride, stride, scale + r * per_row, x_rows, 0, q,
                      out + 4 * r, out_stride)  # fmt: skip
            continue
        for half in (r, r + 4):
            w_at, scale_at, out_at, c = w + half * stride, scale + half * per_row, out + 4 * half, 0
            while WIDE and c + 4 <= n:
                _dot_tile(4, 4, 1, kind, w_at, stride, scale_at, x_rows + 8 * c, 0, q,
                          out_at + c * out_stride, out_stride)  # fmt: skip
                c += 4
            while c + 2 <= n:
                _dot_tile(4, 2, 1, kind, w_at, stride, scale_at, x_rows + 8 * c, 0, q,
                          out_at + c * out_stride, out_stride)  # fmt: skip
                c += 2
            if c < n:
                _dot_tile(4, 1, 1, kind, w_at, stride, scale_at, x_rows + 8 * c, 0, q,
                          out_at + c * out_stride, out_stride)  # fmt: skip


@njit
def _many(kind: Any, bits: Any, group: Any, r0: Any, r1: Any, w: Any, stride: Any, scale: Any, per_row: Any,
          x_rows: Any, q: Any, out: Any, out_stride: Any, n: Any, panel: Any) -> None:  # fmt: skip
    for start in range(r0, r1, 4):
        r = min(start, r1 - 4)
        for k in range(0, q, PANEL):
            length = min(PANEL, q - k)
            for i in range(4):
                w_at = w + (r + i) * stride + k * bits // 8
                scale_at = scale + (r + i) * per_row + (k // group * 2 if group else 0)
                _widen(kind, w_at, w_at + 4 * stride, scale_at, length, panel + i * PANEL * 4)
            c, out_at = 0, out + 4 * r
            while c < n:
                rows, out_c, left = x_rows + 8 * c, out_at + c * out_stride, n - c
                if left >= MANY and not (WIDE and left == 8):  # 4 + 4 is faster than 6 + 2
                    _dot_tile(4, MANY, 0, np.float32(0), panel, PANEL * 4, 0, rows, k, length, out_c, out_stride)
                    c += MANY
                elif left >= 4:
                    _dot_tile(4, 4, 0, np.float32(0), panel, PANEL * 4, 0, rows, k, length, out_c, out_stride)
                    c += 4
                elif left >= 2:
                    _dot_tile(4, 2, 0, np.float32(0), panel, PANEL * 4, 0, rows, k, length, out_c, out_stride)
                    c += 2
                else:
                    _dot_tile(4, 1, 0, np.float32(0), panel, PANEL * 4, 0, rows, k, length, out_c, out_stride)
                    c += 1


@njit
def finish(parameters: Any, record: Any, first: Any, last: Any, a: Any, z: Any) -> None:
    """Add the bias and apply the activation to columns a..z (of the gate, and of up beside it) of rows first..last."""
    p, bias_at, out, h, act = parameters[3], parameters[7], parameters[10], parameters[11], parameters[12]
    one, halves = np.float32(1), parameters[13]
    f = p // halves
    for i in range(first, last):
        row = out + i * p * 4
        if bias_at >= 0:
            for half in range(halves):
                bias = carray(_pointer(record + bias_at + (half * f + a) * 4, one), (z - a,))
                y = carray(_pointer(row + (half * f + a) * 4, one), (z - a,))
                for k in range(z - a):
                    y[k] += bias[k]
        if act:
            pre, gated = row + a * 4, halves - 1
            _by_number(act, gated, pre, pre + gated * f * 4, z - a, h + (i * f + a) * 4)


@njit
def _by_number(act: Any, gated: Any, pre: Any, up: Any, length: Any, to: Any) -> None:
    if act == 1:
        activate("silu", gated, pre, up, length, to)
    elif act == 2:
        activate("gelu_pytorch_tanh", gated, pre, up, length, to)
    elif act == 3:
        activate("relu", gated, pre, up, length, to)
    else:
        activate("relu2", gated, pre, up, length, to)


@njit
def take(parameters: Any) -> Any:
    """The next item: record, first row, last row, first and last of its columns of the result; record 0 at the end."""
    item, splits = _next(parameters), parameters[2]
    if item >= parameters[1]:
        return 0, 0, 0, 0, 0
    at, part = HEADER + 3 * (item // splits), item % splits
    width = parameters[3] // parameters[13]
    a = width // BLOCK * part // splits * BLOCK
    z = width if part + 1 == splits else width // BLOCK * (part + 1) // splits * BLOCK
    return parameters[at], parameters[at + 1], parameters[at + 2], a, z


@njit
def point(parameters: Any, rows: Any, first: Any, n: Any, nbytes: Any) -> None:
    """Write the addresses of n rows of x, `nbytes` each, to the list at `rows`."""
    listed = _pointer(rows, np.int64(0))
    for c in range(n):
        row = first + c
        if parameters[9]:
            row = _pointer(parameters[9], np.int64(0))[row]
        listed[c] = parameters[8] + row * nbytes


@njit
def _product(parameters: Any, kind: Any, bits: Any, group: Any) -> None:
    """Parameters: counter; items; splits; p; q; where in a record codes, scales and bias (or -1) begin; x; the row of x
    of each row, int64, or 0; out ``[n, p]``; h ``[n, f]``; number of the activation or 0; how many parts of `up`
    (2: gate and up) an item takes its rows from.
    """
    p, q = parameters[3], parameters[4]
    stride = q * bits // 8
    per_row = q // group * 2 if group else 4
    rows, panel = scratch(LIST_BYTES), scratch(PANEL_BYTES)
    while True:
        record, first, last, a, z = take(parameters)
        if record == 0:
            break
        w, scale = record + parameters[5], record + parameters[6]
        for start in range(first, last, CHUNK):
            n = min(CHUNK, last - start)
            point(parameters, rows, start, n, q * 4)
            out = parameters[10] + start * p * 4
            for half in range(parameters[13]):
                shift = half * (p // parameters[13])
                if n <= FEW or bits > 4:
                    _few(kind, shift + a, shift + z, w, stride, scale, per_row, rows, q, out, p * 4, n)
                else:
                    _many(
                        kind,
                        bits,
                        group,
                        shift + a,
                        shift + z,
                        w,
                        stride,
                        scale,
                        per_row,
                        rows,
                        q,
                        out,
                        p * 4,
                        n,
                        panel,
                    )
        finish(parameters, record, first, last, a, z)


def product_32(parameters: Any) -> None:
    _product(parameters, np.float32(0), 32, 0)


def product_16(parameters: Any) -> None:
    _product(parameters, np.uint16(0), 16, 0)


def product_8(parameters: Any) -> None:
    _product(parameters, np.int8(0), 8, 0)


def product_4_32(parameters: Any) -> None:
    _product(parameters, np.uint8(0), 4, 32)


def product_4_64(parameters: Any) -> None:
    _product(parameters, np.int16(0), 4, 64)


@functools.cache
def address(name: str) -> int:
    """The address of the kernel `name` of this file, compiled on first use."""
    return compiled(globals()[name], cpu_kernels, stored_vectors)
