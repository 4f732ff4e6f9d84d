"""CPU kernels that multiply stored weights of 8 or 4 bits with rows rounded to 8 bits, four products an instruction.

``vpdpbusd`` multiplies unsigned by signed bytes and adds four products to each int32 lane. The weights are the
unsigned side (their codes plus 128, or 4-bit codes as they are) and every lane starts at what that offset adds up to,
so nothing is to be corrected afterwards. A row of x is cut in blocks of `BLOCK_COLUMNS` columns (the last ones of
`PAIR`), and each of the 16 lanes of a block has its own scale: 32 columns share one, as in llama.cpp's Q8, but they
are columns that meet in one lane, so a block needs one conversion to float32 for each scale of the weights only.

Legend: a row of rounded x is its blocks one after another; a block is its codes int8 in the order in which the
weights' bytes come out of a register, 16 scales float32, and the starts of the lanes, 16 int32 for each scale of the
weights in a lane (8 bits: one; 4 bits: one for every `PAIR` columns).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from collegium.experts.compute import cpu_kernels, stored_kernels, stored_vectors
from collegium.experts.compute.cpu_kernels import _int, _next, _offset, _pointer, _prefetch, _splat
from collegium.experts.compute.jit import LANES, cgutils, intrinsic, ir, missing, njit, types
from collegium.experts.compute.stored_kernels import CHUNK, LIST_BYTES, finish, point, take
from collegium.experts.compute.stored_vectors import (
    F16,
    F32,
    I8,
    I32,
    I64,
    call,
    compiled,
    fma,
    lane_sum,
    read,
    scratch,
)

__all__ = ["PAIR", "address", "round_row", "row_bytes", "why_not"]

PAIR = 128
"""Columns of two registers of bytes: q is a multiple of it."""

BLOCK_COLUMNS = 4 * PAIR
SUM_BYTES = CHUNK * 2 * 64

if missing is None:
    CODES, SUMS_I, SUMS = ir.VectorType(I8, 64), ir.VectorType(I32, 16), ir.VectorType(F32, 16)
    INFINITE = ir.Constant(SUMS_I, [0x7F800000] * 16)
    TINY = 0x02000000  # the bits of some 1e-37: below, the inverse of a scale would not be finite
    # how many columns share a scale: all of a row (8 bits) or a group
    GROUPS = {types.int8: 0, types.uint8: 32, types.int16: 64}


@functools.cache
def why_not() -> str | None:
    """Why these kernels cannot run on this machine, or None when they can."""
    if missing is not None:
        return f"Numba is not usable here ({missing})"
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features()
    lacking = [name for name in ("avx512bw", "avx512vnni") if not features.get(name)]
    return f"this CPU lacks {' and '.join(lacking)}" if lacking or LANES != 16 else None


def row_bytes(bits: int, q: int) -> int:
    """Bytes of a rounded row of q columns, a multiple of 64."""
    full, rest = divmod(q, BLOCK_COLUMNS)
    return int(full * _block_bytes(bits, 4) + rest // PAIR * _block_bytes(bits, 1))


@njit
def _block_bytes(bits: Any, pairs: Any) -> Any:
    return pairs * PAIR + 64 + 64 * (pairs if bits == 4 else 1)


# ---- rounding ------------------------------------------------------------------------------------------------------


def _column(v: int, byte: int, half: int) -> int:
    """Column of a block whose code is the byte'th of register v; half is half a group of 4 bits, or 0."""
    if half == 0:
        return 64 * v + byte
    return PAIR * (v // 2) + byte // half * 2 * half + v % 2 * half + byte % half


def _quads(b: Any, join: Any, vectors: list[Any]) -> tuple[list[Any], Any]:
    """Every four neighbours joined: spread over the four again, and once each in one vector of 16."""
    spread = []
    for vector in vectors:
        for shift in (1, 2):
            other = ir.Constant(ir.VectorType(I32, 16), [lane ^ shift for lane in range(16)])
            vector = join(vector, b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), other))
        spread.append(vector)
    firsts = ir.Constant(ir.VectorType(I32, 8), list(range(0, 32, 4)))
    parts = [b.shuffle_vector(spread[j], spread[j + 1], firsts) for j in (0, 2)]
    return spread, b.shuffle_vector(*parts, ir.Constant(ir.VectorType(I32, 16), list(range(16))))


@intrinsic(prefer_literal=True)
def _round_block(typing: Any, kind: Any, pairs: Any, x: Any, out: Any) -> Any:
    """Write the block of the columns at x. Lanes with a number that is not finite get scale NaN."""
    group, registers = GROUPS[kind], 2 * pairs.literal_value

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, out = args[2:]
        columns = [[_column(v, 16 * j, group // 2) for j in range(4)] for v in range(registers)]
        values = [[read(b, b.add(x, _int(4 * c)), SUMS, 4) for c in row] for row in columns]

        def largest(one: Any, two: Any) -> Any:
            return b.select(b.icmp_signed(">", one, two), one, two)

        # sizes as integers: comparisons of floats lose NaN
        sizes = [[b.and_(b.bitcast(v, SUMS_I), _splat(0x7FFFFFFF, SUMS_I)) for v in row] for row in values]
        tops, top = _quads(b, largest, [functools.reduce(largest, column) for column in zip(*sizes, strict=True)])
        _write(b, _scale_of(b, top), out, 64 * registers)
        inverses = [b.fdiv(_splat(1.0, SUMS), _scale_of(b, value)) for value in tops]
        usable = [b.and_(b.icmp_signed(">", t, _splat(TINY, SUMS_I)), b.icmp_signed("<", t, INFINITE)) for t in tops]
        codes: list[list[Any]] = []
        for v in range(registers):
            codes.append([])
            for j in range(4):
                scaled = b.select(usable[j], b.fmul(values[v][j], inverses[j]), _splat(0.0, SUMS))
                code = b.fptosi(call(b, "llvm.rint.v16f32", SUMS, scaled), SUMS_I)
                codes[v].append(code)
                _write(b, b.trunc(code, ir.VectorType(I8, 16)), out, 64 * v + 16 * j)
        per_start = 2 if group else registers
        for at in range(0, registers, per_start):
            sums = [functools.reduce(b.add, column) for column in zip(*codes[at : at + per_start], strict=True)]
            _, total = _quads(b, b.add, sums)
            start = b.mul(total, _splat(-8 if group else -128, SUMS_I))
            _write(b, start, out, 64 * (registers + 1 + at // per_start))
        return context.get_dummy_value()

    return types.void(kind, pairs, types.intp, types.intp), generate


def _scale_of(b: Any, size: Any) -> Any:
    """The scale for values up to that size (the bits of a float)."""
    scale = b.fmul(b.bitcast(size, SUMS), _splat(1 / 127, SUMS))
    return b.select(b.icmp_signed("<", size, INFINITE), scale, _splat(float("nan"), SUMS))


def _write(b: Any, value: Any, out: Any, at: int) -> None:
    b.store(value, b.inttoptr(b.add(out, _int(at)), value.type.as_pointer())).align = 16


@njit
def round_row(kind: Any, bits: Any, x: Any, q: Any, out: Any) -> None:
    """Write the blocks of one row of float32."""
    k = 0
    while k + BLOCK_COLUMNS <= q:
        _round_block(kind, 4, x + k * 4, out)
        out += _block_bytes(bits, 4)
        k += BLOCK_COLUMNS
    while k < q:
        _round_block(kind, 1, x + k * 4, out)
        out += _block_bytes(bits, 1)
        k += PAIR


@njit
def _round_rows(parameters: Any, kind: Any, bits: Any) -> None:
    """Parameters: counter, rows, q, x ``[n, q]``, out, bytes of a row of out."""
    n, q = parameters[1], parameters[2]
    while True:
        row = _next(parameters)
        if row >= n:
            break
        round_row(kind, bits, parameters[3] + row * q * 4, q, parameters[4] + row * parameters[5])


# ---- products ------------------------------------------------------------------------------------------------------


def _scales(b: Any, place: Any, group: int, pairs: int) -> list[Any]:
    """The halves at `place`, spread over the lanes of each pair of registers."""
    count, lanes = pairs * PAIR // group, 16 * group // PAIR
    found = b.fpext(read(b, place, ir.VectorType(F16, count), 2), ir.VectorType(F32, count))
    spread = []
    for v in range(pairs):
        pick = [v * PAIR // group + lane // lanes for lane in range(16)]
        mask = ir.Constant(ir.VectorType(I32, 16), pick)
        spread.append(b.shuffle_vector(found, ir.Constant(found.type, ir.Undefined), mask))
    return spread


def _unsigned(b: Any, row: Any, group: int, pairs: int) -> list[Any]:
    """The weights of a block as registers of unsigned bytes."""
    if not group:
        flip = _splat(-128, CODES)
        return [b.xor(read(b, b.add(row, _int(64 * v)), CODES, 1), flip) for v in range(2 * pairs)]
    found = []
    for v in range(pairs):
        packed = read(b, b.add(row, _int(64 * v)), CODES, 1)
        found += [b.and_(packed, _splat(15, CODES)), b.lshr(packed, _splat(4, CODES))]
    return found


def _multiply(b: Any, total: Any, weights: Any, x: Any) -> Any:
    words = [b.bitcast(value, SUMS_I) for value in (weights, x)]
    return call(b, "llvm.x86.avx512.vpdpbusd.512", SUMS_I, total, *words)


def _block_product(b: Any, weights: list[Any], scales: list[Any], x: Any, total: Any) -> Any:
    """`total` plus the block's lanes of one row of weights and the block of x at address x."""
    registers = len(weights)
    codes = [read(b, b.add(x, _int(64 * v)), CODES, 64) for v in range(registers)]
    own = read(b, b.add(x, _int(64 * registers)), SUMS, 64)
    starts = [read(b, b.add(x, _int(64 * (registers + 1 + v))), SUMS_I, 64) for v in range(len(scales) or 1)]
    if not scales:
        lanes = starts[0]
        for v in range(registers):
            lanes = _multiply(b, lanes, weights[v], codes[v])
        block = b.sitofp(lanes, SUMS)
    else:
        block = None
        for v, scale in enumerate(scales):
            lanes = _multiply(b, starts[v], weights[2 * v], codes[2 * v])
            lanes = b.sitofp(_multiply(b, lanes, weights[2 * v + 1], codes[2 * v + 1]), SUMS)
            block = b.fmul(lanes, scale) if block is None else fma(b, lanes, scale, block)
    return fma(b, block, own, total)


@intrinsic(prefer_literal=True)
def _block_tile(
    typing: Any, kind: Any, pairs: Any, w: Any, stride: Any, scale: Any, per_row: Any, x_rows: Any, at: Any,
    n: Any, sums: Any,
) -> Any:  # fmt: skip
    """``sums[c, r] += w[r] . x[c]`` for 2 rows of w and n of x in one block, at byte `at` of a row of x."""
    group, size = GROUPS[kind], pairs.literal_value

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        w, stride, scale, per_row, x_rows, at, n, sums = args[2:]
        rows = [w, b.add(w, stride)]
        for row in rows:
            for line in range(size * PAIR // (128 if group else 64)):
                _prefetch(b, b.add(b.add(row, b.mul(stride, _int(8))), _int(64 * line)))
        weights = [_unsigned(b, row, group, size) for row in rows]
        scales = [_scales(b, s, group, size) if group else [] for s in (scale, b.add(scale, per_row))]
        with cgutils.for_range(b, n) as loop:
            x = b.add(read(b, _offset(b, x_rows, loop.index, 8), I64, 8), at)
            for r in range(2):
                place = b.inttoptr(b.add(_offset(b, sums, loop.index, 128), _int(64 * r)), SUMS.as_pointer())
                b.store(_block_product(b, weights[r], scales[r], x, b.load(place)), place)
        return context.get_dummy_value()

    return types.void(kind, pairs, *[types.intp] * 8), generate


@intrinsic
def _finish_tile(typing: Any, kind: Any, sums: Any, scale: Any, out: Any, stride: Any, n: Any) -> Any:
    """``out[c, r]`` from the lanes of ``sums[c, r]``; 8 bits: times the scales of the two rows."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        sums, scale, out, stride, n = args[1:]
        with cgutils.for_range(b, n) as loop:
            for r in range(2):
                total = lane_sum(b, read(b, b.add(_offset(b, sums, loop.index, 128), _int(64 * r)), SUMS, 64))
                if not GROUPS[kind]:
                    total = b.fmul(total, read(b, b.add(scale, _int(4 * r)), F32, 4))
                place = b.add(b.add(out, b.mul(stride, loop.index)), _int(4 * r))
                b.store(total, b.inttoptr(place, F32.as_pointer()))
        return context.get_dummy_value()

    return types.void(kind, *[types.intp] * 5), generate


@njit
def _rows(kind: Any, bits: Any, group: Any, r0: Any, r1: Any, w: Any, scale: Any, x_rows: Any, q: Any, out: Any,
          out_stride: Any, n: Any, sums: Any) -> None:  # fmt: skip
    stride = q * bits // 8
    per_row = q // group * 2 if group else 4
    cleared = _pointer(sums, np.float32(0))
    for start in range(r0, r1, 2):
        r = min(start, r1 - 2)
        for i in range(n * 32):
            cleared[i] = 0
        w_at, scale_at, at, k = w + r * stride, scale + r * per_row, 0, 0
        while k + BLOCK_COLUMNS <= q:
            k_scale = scale_at + (k // group * 2 if group else 0)
            _block_tile(kind, 4, w_at + k * bits // 8, stride, k_scale, per_row, x_rows, at, n, sums)
            at += _block_bytes(bits, 4)
            k += BLOCK_COLUMNS
        while k < q:
            k_scale = scale_at + (k // group * 2 if group else 0)
            _block_tile(kind, 1, w_at + k * bits // 8, stride, k_scale, per_row, x_rows, at, n, sums)
            at += _block_bytes(bits, 1)
            k += PAIR
        _finish_tile(kind, sums, scale_at, out + 4 * r, out_stride, n)


@njit
def _product(parameters: Any, kind: Any, bits: Any, group: Any) -> None:
    """The parameters of `stored_kernels`, with rounded rows as x."""
    p, q, halves = parameters[3], parameters[4], parameters[13]
    rows, sums = scratch(LIST_BYTES), scratch(SUM_BYTES)
    full = q // BLOCK_COLUMNS
    nbytes = full * _block_bytes(bits, 4) + (q - full * BLOCK_COLUMNS) // PAIR * _block_bytes(bits, 1)
    while True:
        record, first, last, a, z = take(parameters)
        if record == 0:
            break
        w, scale = record + parameters[5], record + parameters[6]
        for start in range(first, last, CHUNK):
            n, out = min(CHUNK, last - start), parameters[10] + start * p * 4
            point(parameters, rows, start, n, nbytes)
            for half in range(halves):
                shift = half * (p // halves)
                _rows(kind, bits, group, shift + a, shift + z, w, scale, rows, q, out, p * 4, n, sums)
        finish(parameters, record, first, last, a, z)


def round_8(parameters: Any) -> None:
    _round_rows(parameters, np.int8(0), 8)


def round_4_32(parameters: Any) -> None:
    _round_rows(parameters, np.uint8(0), 4)


def round_4_64(parameters: Any) -> None:
    _round_rows(parameters, np.int16(0), 4)


def product_8(parameters: Any) -> None:
    _product(parameters, np.int8(0), 8, 0)


def product_4_32(parameters: Any) -> None:
    _product(parameters, np.uint8(0), 4, 32)


def product_4_64(parameters: Any) -> None:
    _product(parameters, np.int16(0), 4, 64)


@functools.cache
def address(name: str) -> int:
    """The address of the kernel `name` of this file, compiled on first use."""
    return compiled(globals()[name], cpu_kernels, stored_vectors, stored_kernels)
