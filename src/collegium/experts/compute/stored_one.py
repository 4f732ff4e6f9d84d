"""Kernels for one row, rounded to 8 bits: a token's experts in one launch, and a linear map in one launch.

At one row a product takes about as long as three calls of torch, so what surrounds it counts. Here threads round the
row themselves, each for itself, and go from one product to the next without coming back: whoever finds no more items of
a phase waits until those taken are done. Items are taken in order, so a phase that is waited for always ends, however
many threads there are. Sums are those of `stored_int8`, bit for bit.

Legend: d model width, f expert width, u = 2f for gated experts, n experts of the token; a matrix is ``[p, q]``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collegium.experts.compute import cpu_kernels, stored_int8, stored_kernels, stored_vectors
from collegium.experts.compute.cpu_kernels import _int, _next, _pointer
from collegium.experts.compute.cpu_pool import launch
from collegium.experts.compute.jit import carray, cgutils, intrinsic, ir, njit, types
from collegium.experts.compute.stored_int8 import _rows, round_row
from collegium.experts.compute.stored_kernels import BLOCK, ITEM_ROWS, _widen, finish, take
from collegium.experts.compute.stored_vectors import I64, compiled, narrow, scratch

__all__ = ["WIDEST", "Phase", "linear_one", "token_experts"]

WIDEST = 16384
"""Most columns of a matrix: a rounded row has a place on the stack."""

_ROUNDED_BYTES = 2 * WIDEST  # 4 bits: 832 bytes for 512 columns
_WIDE_BYTES, _BIAS_BYTES, _ONE_SUM = 4 * WIDEST, 4 * BLOCK, 2 * 64
_HEADER = 5


# ---- fragments -----------------------------------------------------------------------------------------------------


@intrinsic
def _address(typing: Any, pointer: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.ptrtoint(args[0], I64)

    return types.int64(pointer), generate


@intrinsic
def _arrive(typing: Any, counter: Any) -> Any:
    """Add 1 to a counter, after all that was written before."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", args[0], _int(1), "release")

    return types.int64(counter), generate


@intrinsic
def _seen(typing: Any, counter: Any) -> Any:
    """A counter's value; what was written before it got there can be read after this."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.load_atomic(args[0], "acquire", 8)

    return types.int64(counter), generate


@intrinsic
def _breathe(typing: Any) -> Any:
    """Leave the core to its other thread for a moment."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@njit
def _wait(counter: Any, count: Any) -> None:
    while _seen(counter) < count:
        _breathe()


# ---- the experts of a token ----------------------------------------------------------------------------------------
#
# Parameters: how many items of `up`, and how many of `down`, are done; where the blocks of up, down and the sum begin,
# as numbers of parameters from the start. The first two blocks are those of `stored_kernels._product`; the sum's are:
# counter, items, d, n, rows ``[n, d]``, weights ``[n]``, sums ``[d]``, the same in bfloat16 (or 0).


@njit
def _block(parameters: Any, number: Any) -> Any:
    return _pointer(_address(parameters) + 8 * parameters[number], np.int64(0))


@njit
def _token(parameters: Any, kind: Any, bits: Any, group: Any) -> None:
    up, down, done = _block(parameters, 2), _block(parameters, 3), _pointer(_address(parameters) + 8, np.int64(0))
    _phase(up, parameters, kind, bits, group, 0)
    _wait(parameters, up[1])
    _phase(down, done, kind, bits, group, 1)
    if parameters[4]:
        _wait(done, down[1])
        _sum(_block(parameters, 4))


@njit
def _phase(block: Any, done: Any, kind: Any, bits: Any, group: Any, own: Any) -> None:
    """Items of a product; each expert has a row of x of its `own`, or all have the first one."""
    rows, sums, rounded = scratch(8), scratch(_ONE_SUM), scratch(_ROUNDED_BYTES)
    _pointer(rows, np.int64(0))[0] = rounded
    p, q, halves, at = block[3], block[4], block[13], -1
    while True:
        record, first, last, a, z = take(block)
        if record == 0:
            break
        row = first * own
        if row != at:
            round_row(kind, bits, block[8] + row * q * 4, q, rounded)
            at = row
        w, scale, out = record + block[5], record + block[6], block[10] + first * p * 4
        for half in range(halves):
            shift = half * (p // halves)
            _rows(kind, bits, group, shift + a, shift + z, w, scale, rows, q, out, p * 4, 1, sums)
        finish(block, record, first, last, a, z)
        _arrive(done)


@njit
def _sum(block: Any) -> None:
    one = np.float32(1)
    items, d, n, weight = block[1], block[2] // BLOCK, block[3], _pointer(block[5], one)
    while True:
        item = _next(block)
        if item >= items:
            break
        first, last = d * item // items * BLOCK, d * (item + 1) // items * BLOCK
        y = carray(_pointer(block[6] + first * 4, one), (last - first,))
        for k in range(last - first):
            y[k] = np.float32(0)
        for i in range(n):
            row = carray(_pointer(block[4] + (i * block[2] + first) * 4, one), (last - first,))
            for k in range(last - first):
                y[k] += weight[i] * row[k]
        if block[7]:
            narrow(block[6] + first * 4, one, last - first, block[7] + first * 2)


def token_8(parameters: Any) -> None:
    _token(parameters, np.int8(0), 8, 0)


def token_4_32(parameters: Any) -> None:
    _token(parameters, np.uint8(0), 4, 32)


def token_4_64(parameters: Any) -> None:
    _token(parameters, np.int16(0), 4, 64)


# ---- a linear map --------------------------------------------------------------------------------------------------


def linear_8(parameters: Any) -> None:
    """Parameters: counter; items; p; q; codes; scales; x in bfloat16; bias in bfloat16 or 0; out in bfloat16."""
    kind, half, one = np.int8(0), np.uint16(0), np.float32(1)
    p, q = parameters[2], parameters[3]
    rows, sums, rounded, wide = scratch(8), scratch(_ONE_SUM), scratch(_ROUNDED_BYTES), scratch(_WIDE_BYTES)
    _pointer(rows, np.int64(0))[0] = rounded
    _widen(half, parameters[6], parameters[6], 0, q, wide)
    round_row(kind, 8, wide, q, rounded)
    biases, added = scratch(_BIAS_BYTES), parameters[7]
    while True:
        item = _next(parameters)
        if item >= parameters[1]:
            break
        a = p // BLOCK * item // parameters[1] * BLOCK
        z = p if item + 1 == parameters[1] else p // BLOCK * (item + 1) // parameters[1] * BLOCK
        _rows(kind, 8, 0, a, z, parameters[4], parameters[5], rows, q, wide - 4 * a, 0, 1, sums)
        for start in range(a, z, BLOCK):
            r = min(start, z - BLOCK)
            if added:
                _widen(half, added + 2 * r, added + 2 * r, 0, BLOCK, biases)
                y, bias = carray(_pointer(wide + 4 * (r - a), one), (BLOCK,)), carray(_pointer(biases, one), (BLOCK,))
                for k in range(start - r, BLOCK):
                    y[k] += bias[k]
            narrow(wide + 4 * (r - a), one, BLOCK, parameters[8] + 2 * r)


# ---- calls ---------------------------------------------------------------------------------------------------------

Phase = tuple[int, ...]
"""A product's parameters before its groups, without the counter and the numbers of items and splits."""


@functools.cache
def _kernel(name: str) -> int:
    return compiled(globals()[name], cpu_kernels, stored_vectors, stored_kernels, stored_int8)


def token_experts(
    bits: int, group: int, up: Phase, down: Phase, splits: tuple[int, int], groups: Sequence[int], total: Phase | None
) -> None:
    """Run a token's experts: `up` with its activation, `down`, and the weighted sum where `total` is given.

    Args:
        bits, group: of the weights.
        up, down: as in `stored_kernels._product`, with x ``[1, d]`` and h ``[n, f]`` in float32.
        splits: of an expert's rows in each.
        groups: record, first and last row of each expert.
        total: d, n, and the addresses of rows, weights, sums and their bfloat16 copy.
    """
    n = len(groups) // 3
    first, second = ((0, n * count, count, *phase, *groups) for count, phase in zip(splits, (up, down), strict=True))
    last = () if total is None else (0, 4 * torch.get_num_threads(), *total)
    places = _HEADER, _HEADER + len(first), _HEADER + len(first) + len(second) if last else 0
    name = f"token_{bits}_{group}" if group else f"token_{bits}"
    launch(_kernel(name), 0, *places, *first, *second, *last)


def linear_one(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ w.T + bias`` of one row in bfloat16, contiguous ``[..., q]``; w in 8 bits ``[p, q]``, q a multiple of 128.

    Returns:
        ``[..., p]`` bfloat16.
    """
    p, q = codes.shape
    out = torch.empty((*x.shape[:-1], p), dtype=torch.bfloat16)
    numbers = (p // ITEM_ROWS or 1, p, q, codes.data_ptr(), scale.data_ptr(), x.data_ptr())
    launch(_kernel("linear_8"), *numbers, 0 if bias is None else bias.data_ptr(), out.data_ptr())
    return out
