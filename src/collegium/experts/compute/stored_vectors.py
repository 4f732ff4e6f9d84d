"""What the kernels on stored weights are made of: fragments of LLVM code, the activations, and the compiler's cache.

Legend: b an LLVM builder, whose values are addresses (int64) and vectors of `LANES` floats; i a column of a row. A
*kind* is an example value whose type says how weights are stored, one of `KINDS`.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

from collegium.experts.compute.cpu_kernels import _for_columns, _int, _load, _offset, _prefetch, _splat, _store
from collegium.experts.compute.jit import LANES, cfunc, cgutils, intrinsic, ir, missing, types

__all__ = [
    "KINDS",
    "activate",
    "call",
    "codes",
    "columns",
    "compiled",
    "fma",
    "group_scale",
    "lane_sum",
    "narrow",
    "read",
    "scratch",
    "spread",
]

LINE = 64
"""Bytes that come from memory together."""

KINDS: dict[Any, tuple[int, int]] = {}
"""Type of a kind -> bits of a weight, and weights of a group or 0."""

I8: Any
I32: Any
I64: Any
F16: Any
F32: Any
VECTOR: Any
VECTOR_I: Any
BYTES: Any
I8 = I32 = I64 = F16 = F32 = VECTOR = VECTOR_I = BYTES = None
if missing is None:
    I8, I32, I64, F16, F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
    VECTOR, VECTOR_I, BYTES = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I8, LANES)
    KINDS.update({types.float32: (32, 0), types.uint16: (16, 0), types.int8: (8, 0)})
    KINDS.update({types.uint8: (4, 32), types.int16: (4, 64)})


def call(b: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def fma(b: Any, x: Any, y: Any, total: Any) -> Any:
    """``x * y + total``, rounded once where the CPU can: then no compiler's choice changes a result."""
    return call(b, f"llvm.fmuladd.v{LANES}f32", VECTOR, x, y, total)


def spread(b: Any, scalar: Any) -> Any:
    undefined = ir.Constant(VECTOR, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, scalar, ir.Constant(I32, 0)), undefined, _splat(0, VECTOR_I))


def read(b: Any, address: Any, kind: Any, align: int) -> Any:
    value = b.load(b.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def _nibbles(b: Any, packed: Any) -> Any:
    """The weights of LANES int32 whose low halves of a byte hold codes: ``code - 8`` in float32."""
    if LANES == 16:  # a table of 16 floats fits a register, and its lookup ignores the bits above
        table = ir.Constant(VECTOR, [float(code - 8) for code in range(16)])
        return call(b, "llvm.x86.avx512.permvar.sf.512", VECTOR, table, packed)
    return b.sitofp(b.sub(b.and_(packed, _splat(15, VECTOR_I)), _splat(8, VECTOR_I)), VECTOR)


def codes(b: Any, bits: int, group: int, row: Any, i: Any) -> list[tuple[int, Any]]:
    """Unscaled weights from column i on: ``(columns after i, vector)`` for LANES columns, or a group of 4 bits."""
    if bits >= 16:
        return [(0, _load(b, _offset(b, row, i, bits // 8), bits // 8))]
    if bits == 8:
        return [(0, b.sitofp(b.sext(read(b, b.add(row, i), BYTES, 1), VECTOR_I), VECTOR))]
    found, half, row = [], group // 2, b.add(row, b.lshr(i, _int(1)))
    for k in range(0, half, LANES):
        packed = b.zext(read(b, b.add(row, _int(k)), BYTES, 1), VECTOR_I)
        found += [(k, _nibbles(b, packed)), (half + k, _nibbles(b, b.lshr(packed, _splat(4, VECTOR_I))))]
    return found


def group_scale(b: Any, scale: Any, i: Any, group: int) -> Any:
    place = _offset(b, scale, b.lshr(i, _int(group.bit_length() - 1)), 2)
    return spread(b, b.fpext(read(b, place, F16, 2), F32))


def columns(b: Any, bits: int, group: int, length: Any, body: Any, ahead: list[Any]) -> None:
    """`body(i)` for every step of a row's columns; fetches the same columns of the rows at `ahead` line by line."""
    step, whole = group or LANES, LINE * 8 // bits
    main = b.and_(length, _int(-whole))
    with cgutils.for_range_slice(b, _int(0), main, _int(whole), I64) as (i, _):
        for row in ahead:
            _prefetch(b, b.add(row, b.lshr(b.mul(i, _int(bits)), _int(3))))
        for k in range(0, whole, step):
            body(b.add(i, _int(k)))
    with cgutils.for_range_slice(b, main, length, _int(step), I64) as (i, _):
        body(i)


def lane_sum(b: Any, vector: Any) -> Any:
    """The lanes of a vector added up."""
    kind = ir.FunctionType(F32, [F32, vector.type])
    reduce = cgutils.get_or_insert_function(b.module, kind, f"llvm.vector.reduce.fadd.v{vector.type.count}f32")
    return b.call(reduce, [ir.Constant(F32, 0.0), vector], fastmath=("reassoc",))


def _exp(b: Any, x: Any) -> Any:
    """exp of a vector to some 2 units in the last place: ``2**n * exp(r)`` with ``|r| <= log(2) / 2``."""
    low, high = _splat(-87.0, VECTOR), _splat(88.0, VECTOR)
    inside = b.select(b.fcmp_ordered("<", x, low), low, x)  # NaN passes both comparisons
    inside = b.select(b.fcmp_ordered(">", inside, high), high, inside)
    n = call(b, f"llvm.rint.v{LANES}f32", VECTOR, b.fmul(inside, _splat(1.4426950408889634, VECTOR)))
    r = fma(b, n, _splat(-0.693145751953125, VECTOR), inside)
    r = fma(b, n, _splat(-1.428606765330187e-06, VECTOR), r)
    power = _splat(1 / 5040, VECTOR)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        power = fma(b, power, r, _splat(factor, VECTOR))
    number = b.select(b.fcmp_ordered("ord", n, n), n, _splat(0.0, VECTOR))  # NaN has no integer
    exponent = b.shl(b.add(b.fptosi(number, VECTOR_I), _splat(127, VECTOR_I)), _splat(23, VECTOR_I))
    return b.fmul(power, b.bitcast(exponent, VECTOR))


def _activated(b: Any, name: str, x: Any) -> Any:
    zero, one = _splat(0.0, VECTOR), _splat(1.0, VECTOR)
    if name in ("relu", "relu2"):
        positive = b.select(b.fcmp_ordered("<", x, zero), zero, x)
        return positive if name == "relu" else b.fmul(positive, positive)
    inner = x
    if name == "gelu_pytorch_tanh":  # 0.5 (1 + tanh(z)) is the logistic function of 2z
        cubic = fma(b, b.fmul(_splat(0.044715, VECTOR), b.fmul(x, x)), x, x)
        inner = b.fmul(_splat(2 * 0.7978845608028654, VECTOR), cubic)
    return b.fdiv(x, b.fadd(one, _exp(b, b.fsub(zero, inner))))


@intrinsic(prefer_literal=True)
def activate(typing: Any, name: Any, gated: Any, pre: Any, up: Any, length: Any, out: Any) -> Any:
    """``out = act(pre) * up``, or ``act(pre)`` where `gated` is 0, for `length` columns."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        gated, pre, up, length, out = args[1:]
        pre_only = b.icmp_signed("==", gated, _int(0))

        def body(i: Any, _: Any) -> None:
            value = _activated(b, name.literal_value, _load(b, _offset(b, pre, i, 4), 4))
            factor = b.select(pre_only, _splat(1.0, VECTOR), _load(b, _offset(b, up, i, 4), 4))
            _store(b, b.fmul(value, factor), _offset(b, out, i, 4), 4)

        _for_columns(b, length, body)
        return context.get_dummy_value()

    return types.void(name, *[types.intp] * 5), generate


@intrinsic
def narrow(typing: Any, x: Any, factor: Any, length: Any, out: Any) -> Any:
    """``factor * x`` as bfloat16, for a multiple of `LANES` columns."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, factor, length, out = args
        factors = spread(b, factor)
        with cgutils.for_range_slice(b, _int(0), length, _int(LANES), I64) as (i, _):
            _store(b, b.fmul(_load(b, _offset(b, x, i, 4), 4), factors), _offset(b, out, i, 2), 2)
        return context.get_dummy_value()

    return types.void(x, factor, length, out), generate


@intrinsic(prefer_literal=True)
def scratch(typing: Any, nbytes: Any) -> Any:
    """The address of so many bytes on the stack."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        # cgutils' own allocation also stores zeros, which LLVM would unroll byte by byte
        with b.goto_entry_block():
            memory = b.alloca(ir.ArrayType(I8, nbytes.literal_value))
        memory.align = LINE
        return b.ptrtoint(memory, I64)

    return types.intp(nbytes), generate


@functools.cache
def _digest(*modules: ModuleType) -> str:
    sources = [Path(str(module.__file__)).read_bytes() for module in modules]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def compiled(function: Any, *modules: ModuleType) -> int:
    """The address of a compiled kernel, kept on disk for the next process.

    Numba's cache looks at the age of the kernel's own file only. So the name it is kept under holds a digest of the
    other `modules` its fragments come from.
    """
    function.__qualname__ = f"{function.__name__}_{_digest(*modules)}"
    return int(cfunc(types.void(types.CPointer(types.int64)), cache=True)(function).address)
