"""The CPU kernel of one token's attention: keys and values in bfloat16 are read once, where they lie.

torch multiplies a row by a bfloat16 matrix for each head at a tenth of the memory's bandwidth. Sums and the softmax are
float32; the same fragments are used as for experts.

Legend: G key-value heads, n query heads of each, S keys, D their width, V the width of values.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collegium.experts.compute import cpu_kernels, stored_kernels, stored_one, stored_vectors
from collegium.experts.compute.cpu_kernels import _int, _load, _next, _offset, _pointer, _splat, _store, _sum_tile
from collegium.experts.compute.cpu_pool import float_bits, launch
from collegium.experts.compute.jit import LANES, cgutils, intrinsic, ir, missing, njit, types
from collegium.experts.compute.stored_kernels import _few, _widen
from collegium.experts.compute.stored_one import _address, _arrive
from collegium.experts.compute.stored_vectors import (
    F32,
    I32,
    I64,
    VECTOR,
    _exp,
    compiled,
    lane_sum,
    narrow,
    scratch,
    spread,
)

__all__ = ["attend", "attend_heads", "fits", "numbers_of", "scratch_scores", "softmax"]

_WIDEST = 1024
_ROW_BYTES = 4 * _WIDEST
_FEWEST = 8  # keys: the tile of the first product has so many rows


@intrinsic
def softmax(typing: Any, scores: Any, length: Any, scale: Any) -> Any:
    """Replace each score by ``exp(scale * (score - the largest))``; their sum. `scale`: the bits of a float32 > 0;
    `length`: a multiple of `LANES`."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        scores, length, scale = args
        factor = spread(b, b.bitcast(b.trunc(scale, I32), F32))
        top = cgutils.alloca_once_value(b, _splat(float("-inf"), VECTOR))
        total = cgutils.alloca_once_value(b, _splat(0.0, VECTOR))
        with cgutils.for_range_slice(b, _int(0), length, _int(LANES), I64) as (i, _):
            value, seen = _load(b, _offset(b, scores, i, 4), 4), b.load(top)
            b.store(b.select(b.fcmp_ordered(">", value, seen), value, seen), top)
        kind = ir.FunctionType(F32, [VECTOR])
        reduce = cgutils.get_or_insert_function(b.module, kind, f"llvm.vector.reduce.fmax.v{LANES}f32")
        largest = spread(b, b.call(reduce, [b.load(top)]))
        with cgutils.for_range_slice(b, _int(0), length, _int(LANES), I64) as (i, _):
            place = _offset(b, scores, i, 4)
            share = _exp(b, b.fmul(b.fsub(_load(b, place, 4), largest), factor))
            _store(b, share, place, 4)
            b.store(b.fadd(b.load(total), share), total)
        return lane_sum(b, b.load(total))

    return types.float32(scores, length, scale), generate


@njit
def _head(q: Any, k: Any, k_row: Any, v: Any, v_row: Any, S: Any, D: Any, V: Any, scale: Any, scores: Any, out: Any,
          rows: Any, row: Any) -> None:  # fmt: skip
    half, one = np.uint16(0), np.float32(1)
    _widen(half, q, q, 0, D, row)
    _pointer(rows, np.int64(0))[0] = row
    _few(half, 0, S, k, k_row, 0, 0, rows, D, scores, 0, 1)
    padded = -(-S // LANES) * LANES
    listed = _pointer(scores, one)
    for s in range(S, padded):
        listed[s] = np.float32(-np.inf)
    total = softmax(scores, padded, scale)
    sums = _pointer(row, one)
    for i in range(V):
        sums[i] = np.float32(0)
    whole = S - S % 4
    for s in range(0, whole, 4):
        at = v + s * v_row
        _sum_tile(4, 1, half, at, v_row // 2, scores + 4 * s, 0, V, row, at + 4 * v_row)
    for s in range(whole, S):
        at = v + s * v_row
        _sum_tile(1, 1, half, at, v_row // 2, scores + 4 * s, 0, V, row, at)
    narrow(row, one / total, V, out)


@njit
def attend_heads(parameters: Any) -> None:
    """Parameters: counter; heads of keys; n; S; D; V; bits of the scale; scores of a head; then q ``[G * n, D]``; k;
    bytes from head to head and from key to key; v; the same of values; out ``[G * n, V]``; how many heads are done."""
    heads, n, S, D, V = parameters[1], parameters[2], parameters[3], parameters[4], parameters[5]
    rows, row, done = scratch(64), scratch(_ROW_BYTES), _pointer(_address(parameters) + 8 * 16, np.int64(0))
    while True:
        head = _next(parameters)
        if head >= heads:
            break
        scores = parameters[7] + head * -(-S // LANES) * LANES * 4
        for i in range(head * n, head * n + n):
            _head(parameters[8] + i * D * 2, parameters[9] + head * parameters[10], parameters[11],
                  parameters[12] + head * parameters[13], parameters[14], S, D, V, parameters[6], scores,
                  parameters[15] + i * V * 2, rows, row)  # fmt: skip
        _arrive(done)


def attend_bfloat16(parameters: Any) -> None:
    attend_heads(parameters)


@functools.cache
def _kernel() -> int:
    return compiled(attend_bfloat16, cpu_kernels, stored_vectors, stored_kernels, stored_one)


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these, as `attend` describes them."""
    D, V = key.shape[-1], value.shape[-1]
    return (
        missing is None
        and LANES > 4
        and len(query) == 1
        and query.shape[2] == 1
        and key.shape[2] >= _FEWEST
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and not (D % LANES or V % LANES)
        and max(D, V) <= _WIDEST
        and query.device.type == "cpu"
        and key.stride(-1) == value.stride(-1) == 1
    )


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of the last token of one sequence.

    Args:
        query: ``[1, G * n, 1, D]`` bfloat16.
        key, value: ``[1, G, S, D]`` and ``[1, G, S, V]`` bfloat16, whose rows are contiguous; at least 8 keys.
        scale: of the scores, above 0.

    Returns:
        ``[1, 1, G * n, V]`` bfloat16.
    """
    H, V = query.shape[1], value.shape[-1]
    out = torch.empty(1, 1, H, V, dtype=torch.bfloat16)
    scores = scratch_scores(key)
    launch(_kernel(), *numbers_of(query.reshape(H, -1), key, value, float_bits(scale), scores, out))
    return out


def scratch_scores(key: Tensor) -> Tensor:
    """Room for the scores of all heads, of keys ``[1, G, S, D]``."""
    return torch.empty(key.shape[1], -(-key.shape[2] // LANES) * LANES)


def numbers_of(rows: Tensor, key: Tensor, value: Tensor, scale: int, scores: Tensor, out: Tensor) -> tuple[int, ...]:
    """The parameters of `attend_heads` but its counter.

    Args:
        rows: ``[G * n, D]`` queries.
        scale: bits of it, see `float_bits`.
        scores: of `scratch_scores`.
    """
    _, G, S, D = key.shape
    k_head, k_row, v_head, v_row = (2 * stride for tensor in (key, value) for stride in tensor.stride()[1:3])
    sizes = (G, len(rows) // G, S, D, value.shape[-1], scale, scores.data_ptr(), rows.data_ptr())
    return (*sizes, key.data_ptr(), k_head, k_row, value.data_ptr(), v_head, v_row, out.data_ptr(), 0)
