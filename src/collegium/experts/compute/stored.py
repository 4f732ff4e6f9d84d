"""Experts computed straight from their stored records, on the CPU, in 32, 16, 8 or 4 bits a weight.

Legend: T tokens, n rows (assignments), d model width, f expert width, u = 2f for gated experts; a group is a record
``[layout.nbytes]`` uint8 with the first and last of its rows. See `collegium.experts.stored` for the records.

All arithmetic is in float32, or, where asked, the rows are rounded to 8 bits first (`stored_int8`), which is what
llama.cpp always does. The result of a group depends on its own rows and their number, and on nothing else: not on the
other groups of the call or their order, nor on the number of threads, bit for bit.

Measured for whole experts (d 2048, f 1024, gated; torch: for their `up`) drawn from more than 0.6 GB, on one thread of
a Zen 4 core that other programs shared: the best of repeated runs, by the thread's own CPU time. GB/s of records at one
row, then GFLOP/s at 4, 16 and 64 rows of an expert.

    bits                                   1 row |    4   16   64
    32  torch.mm                             17.9 |   19   48   74
    16  float32                              20.0 |   72   93  104
     8  float32                              18.8 |   94   97   99
     8  int8                                 20.3 |  144  183  193
     8  torch._weight_int8pack_mm            17.4 |   58   70   74
     4  float32, groups of 32 | 64      9.8 | 11.5 |   69   87   98
     4  int8, groups of 32 | 64        19.9 | 20.2 |  143  162  160
     4  torch._weight_int4pack_mm_for_cpu    10.1 |   79   77   80

Two threads, one row of 8 experts, best seen: 30 GB/s in 16 bits, 27 in 8, 18 (float32) and 29 (int8) in 4 bits, where
the memory of the machine gives about 28. float32 arithmetic cannot unpack 4 bits that fast; rounded rows can.
"""

from __future__ import annotations

import functools
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from collegium.errors import ConfigError
from collegium.experts.compute import stored_int8, stored_kernels, stored_one
from collegium.experts.compute.cpu_pool import launch
from collegium.experts.compute.jit import LANES, missing
from collegium.experts.compute.stored_kernels import ACTIVATIONS, BLOCK, CHUNK, ITEM_ROWS
from collegium.experts.stored import ExpertLayout, dequantise

__all__ = ["Group", "Precision", "StoredExperts", "stored_linear", "takes_one"]

Group = tuple[Tensor, int, int]
Precision = Literal["float32", "int8"]

SPAN_ROWS = 8 * CHUNK
"""Rows whose intermediate results are in memory at the same time; a multiple of `CHUNK`, so cutting changes nothing."""

_SERIAL_NUMBERS = 32768  # torch computes fewer on one thread, so that the cut between threads cannot change a result


@functools.cache
def _why_not() -> str | None:
    """Why no kernel of this package can run here, or None."""
    if missing is not None:
        return f"Numba is not usable here ({missing})"
    if LANES == 4 and platform.machine().lower() in ("x86_64", "amd64"):
        return "this CPU lacks AVX2"
    return None


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}: stored weights are widened to float32 matrices by torch at every use, several times as slow "
        "and with memory for one matrix more than collegium's own kernels",
        RuntimeWarning,
        stacklevel=4,
    )


def _products(matrices: Sequence[tuple[int, int]], bits: int, activations: str) -> str:
    """Which products matrices ``[p, q]`` get: "int8", "float32" or, by torch, "reference"."""
    if activations not in ("float32", "int8"):
        raise ConfigError(f"activations are computed in float32 or int8, not {activations!r}")
    reason = _why_not()
    if reason is not None:
        _warn(reason)
        return "reference"
    if any(p < BLOCK or q % BLOCK or not q for p, q in matrices):
        return "reference"
    fits = bits <= 8 and not any(q % stored_int8.PAIR for _, q in matrices)
    return "int8" if activations == "int8" and fits and stored_int8.why_not() is None else "float32"


class StoredExperts:
    """Computes the experts of one layout. Keeps its buffers between calls, so one thread at a time may call it.

    Args:
        layout: of the records.
        activation: ``[..., u] -> [..., f]``.
        fused_activation: a name in `collegium.experts.activations.KNOWN` where `activation` is exactly ``act(gate) *
            up`` of gate and up one after another, or ``act(up)`` of an ungated layout; else None.
        activations: "float32", or "int8" to round the rows that go into a product to 8 bits, 32 numbers to a scale.
            An expert's output is then wrong by some 1 % (root mean square, of Gaussian rows; 0.5 % for each product),
            and products are up to twice as fast with one row in 4 bits, and more with many rows. It is taken where the
            weights have 8 or 4 bits, d and f are multiples of 128 and the CPU has AVX-512 VNNI.

    Attributes:
        products: what is really done: "float32", "int8", or "reference" where the kernels cannot run: without Numba,
            on an x86 CPU without AVX2 (both with a warning), or if d or f is not a multiple of 16.
        runs_tokens: whether `token` can be called.

    Raises:
        ConfigError: no such `activations`.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        activation: Callable[[Tensor], Tensor],
        fused_activation: str | None,
        activations: Precision = "float32",
    ) -> None:
        self.layout, self.activation = layout, activation
        self.products = _products([*layout.matrices.values(), (layout.f, layout.d)], layout.bits, activations)
        self._fused = 0 if layout.interleaved else ACTIVATIONS.get(fused_activation or "", 0)
        one = self.products == "int8" and self._fused and max(layout.d, layout.f) <= stored_one.WIDEST
        self.runs_tokens = bool(one)
        self._buffers: dict[str, Tensor] = {}
        fields = layout.fields

        def where(name: str) -> tuple[int, int, int]:
            """Bytes of a record before the codes, scales and bias (-1: none) of a matrix."""
            scale, bias = fields.get(f"{name}_scale"), fields.get(f"{name}_bias")
            return fields[name][0], 0 if scale is None else scale[0], -1 if bias is None else bias[0]

        self._up, self._down = where("up"), where("down")

    def run(self, x: Tensor, token: Tensor, groups: Sequence[Group], out: Tensor) -> None:
        """``out[i] = expert(x[token[i]])`` for the rows first to last - 1 of each group; the rest is left as it is.

        Biases, gate and up, activation and down are done, but no combine weight.

        Args:
            x: ``[T, d]`` float32, contiguous.
            token: ``[n]`` int64, each in 0 .. T - 1 (not checked).
            groups: ``(record, first, last)``; no row in two groups.
            out: ``[n, d]`` float32, contiguous.

        Raises:
            ConfigError: a tensor has another shape, dtype or stride, or a group has rows that `out` has not.
        """
        if token.dtype != torch.int64 or not token.is_contiguous():
            raise ConfigError(f"token must be contiguous int64, not {token.dtype}")
        self._check(x, token.numel(), groups, out)
        if not groups:
            return
        if self.products == "reference":
            self.reference(x, token, groups, out)
            return
        if self.runs_tokens and len(x) == 1 and all(last - first == 1 for _, first, last in groups):
            self._token(x, groups, out, None)
            return
        layout = self.layout
        address = self._rounded("x", x, layout.d) if self.products == "int8" else x.data_ptr()
        for start, stop, some in _spans(groups):
            numbers = [number for record, a, z in some for number in (record.data_ptr(), a - start, z - start)]
            pre, h = self._buffer("pre", stop - start, layout.u), self._buffer("h", stop - start, layout.f)
            to, number = (h.data_ptr(), self._fused) if self._fused else (0, 0)
            index = token.data_ptr() + 8 * start
            parts = 2 if self._fused and layout.gated else 1
            self._launch(layout.matrices["up"], self._up, address, index, pre, to, number, parts, numbers)
            if not self._fused:
                self._activate(pre, h, some, start)
            hidden = self._rounded("h_codes", h, layout.f) if self.products == "int8" else h.data_ptr()
            self._launch(layout.matrices["down"], self._down, hidden, 0, out[start:], 0, 0, 1, numbers)

    def token(self, x: Tensor, groups: Sequence[Group], weight: Tensor) -> Tensor:
        """The weighted sum of one token's experts, where `runs_tokens`.

        Args:
            x: ``[1, d]`` float32, contiguous.
            groups: ``(record, i, i + 1)`` for each i from 0 to n - 1 in any order.
            weight: ``[n]`` float32, contiguous.

        Returns:
            ``[1, d]`` bfloat16: sums in float32 in the order of the rows, then rounded.

        Raises:
            ConfigError: as for `run`.
        """
        n, d = weight.numel(), self.layout.d
        out = self._buffer("out", n, d)
        if weight.dtype != torch.float32 or not weight.is_contiguous() or len(x) != 1:
            raise ConfigError(f"one token takes contiguous float32 weights, not {len(x)} and {weight.dtype}")
        self._check(x, n, groups, out)
        y = torch.empty(1, d, dtype=torch.bfloat16)
        sums = self._buffer("sums", 1, d)
        total = (d, n, out.data_ptr(), weight.data_ptr(), sums.data_ptr(), y.data_ptr())
        self._token(x, groups, out, total)
        return y

    def _token(self, x: Tensor, groups: Sequence[Group], out: Tensor, total: stored_one.Phase | None) -> None:
        layout = self.layout
        pre, h = self._buffer("pre", len(out), layout.u), self._buffer("h", len(out), layout.f)
        parts = 2 if layout.gated else 1
        (p, q), (r, s) = layout.matrices["up"], layout.matrices["down"]
        up = (p, q, *self._up, x.data_ptr(), 0, pre.data_ptr(), h.data_ptr(), self._fused, parts)
        down = (r, s, *self._down, h.data_ptr(), 0, out.data_ptr(), 0, 0, 1)
        splits = _splits(p, parts, len(groups)), _splits(r, 1, len(groups))
        numbers = [number for record, first, last in groups for number in (record.data_ptr(), first, last)]
        stored_one.token_experts(layout.bits, layout.group, up, down, splits, numbers, total)

    def reference(self, x: Tensor, token: Tensor, groups: Sequence[Group], out: Tensor) -> None:
        """What `run` does, by torch from `ExpertLayout.read`: the oracle."""
        for record, first, last in groups:
            weights = self.layout.read(record)
            pre = F.linear(x[token[first:last]], weights["up"], weights.get("up_bias"))
            out[first:last] = F.linear(self.activation(pre), weights["down"], weights.get("down_bias"))

    def _check(self, x: Tensor, n: int, groups: Sequence[Group], out: Tensor) -> None:
        # kernels get addresses: a wrong shape would read or write somebody else's memory
        d = self.layout.d
        for name, tensor, rows in (("x", x, x.shape[0]), ("out", out, n)):
            if tuple(tensor.shape) != (rows, d) or tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ConfigError(
                    f"{name} must be contiguous float32 [{rows}, {d}], not {tensor.dtype} {list(tensor.shape)}"
                )
        for record, first, last in groups:
            if not 0 <= first <= last <= n:
                raise ConfigError(f"a group has rows {first} to {last}, but there are {n}")
            if record.numel() != self.layout.nbytes or record.dtype != torch.uint8 or not record.is_contiguous():
                raise ConfigError(
                    f"a record must be contiguous uint8 [{self.layout.nbytes}], not {record.dtype} {list(record.shape)}"
                )

    def _buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < rows:
            buffer = self._buffers[name] = torch.empty(rows, columns, dtype=dtype)
        return buffer[:rows]

    def _rounded(self, name: str, rows: Tensor, q: int) -> int:
        """The address of `rows` in 8 bits."""
        size = stored_int8.row_bytes(self.layout.bits, q)
        buffer = self._buffer(name, len(rows), size, torch.uint8)
        _round(rows, self.layout.bits, self.layout.group, buffer)
        return buffer.data_ptr()

    def _launch(
        self, matrix: tuple[int, int], where: tuple[int, int, int], x: int, index: int, out: Tensor,
        h: int, activation: int, parts: int, numbers: Sequence[int],
    ) -> None:  # fmt: skip
        p, q = matrix
        splits = _splits(p, parts, len(numbers) // 3)
        kernel = _kernel("product", self.layout.bits, self.layout.group, self.products)
        items = len(numbers) // 3 * splits
        launch(kernel, items, splits, p, q, *where, x, index, out.data_ptr(), h, activation, parts, *numbers)

    def _activate(self, pre: Tensor, h: Tensor, groups: Sequence[Group], start: int) -> None:
        rows = max(1, _SERIAL_NUMBERS // self.layout.u - 1)
        for _, first, last in groups:
            for a in range(first - start, last - start, rows):
                z = min(a + rows, last - start)
                h[a:z] = self.activation(pre[a:z])


def _spans(groups: Sequence[Group]) -> Iterator[tuple[int, int, list[Group]]]:
    """``(start, stop, groups)`` with at most `SPAN_ROWS` rows from the first to the last; longer groups are cut."""
    start, stop, some = 0, 0, list[Group]()
    for record, first, last in sorted(groups, key=lambda group: group[1]):
        for a in range(first, last, SPAN_ROWS):
            z = min(a + SPAN_ROWS, last)
            if some and z - start > SPAN_ROWS:
                yield start, stop, some
                some = []
            if not some:
                start = a
            some.append((record, a, z))
            stop = z
    if some:
        yield start, stop, some


def _splits(p: int, parts: int, groups: int) -> int:
    wanted = max(p // ITEM_ROWS, -(-4 * torch.get_num_threads() // groups), 1)
    return min(wanted, p // parts // BLOCK)


@functools.cache
def _kernel(name: str, bits: int, group: int, products: str) -> int:
    module = stored_int8 if products == "int8" else stored_kernels
    return module.address(f"{name}_{bits}" + (f"_{group}" if group else ""))


def _round(rows: Tensor, bits: int, group: int, into: Tensor) -> None:
    n, q = rows.shape
    launch(_kernel("round", bits, group, "int8"), n, q, rows.data_ptr(), into.data_ptr(), into.shape[1])


def takes_one(matrix: tuple[int, int]) -> bool:
    """Whether `stored_one.linear_one` can multiply by an 8-bit matrix ``[p, q]`` of this size here."""
    return matrix[1] <= stored_one.WIDEST and _products([matrix], 8, "int8") == "int8"


def stored_linear(
    x: Tensor, codes: Tensor, scale: Tensor | None, bits: int, group: int = 0, activations: Precision = "float32"
) -> Tensor:
    """``x @ w.T`` for one stored matrix w ``[p, q]``.

    Args:
        x: ``[n, q]`` float32; meant for small n.
        codes, scale: as `collegium.experts.stored.quantise` makes them; 32 and 16 bits: the matrix itself, float32 or
            bfloat16, and None. Contiguous.
        bits, group: of w.
        activations: as for `StoredExperts`.

    Returns:
        ``[n, p]`` float32.

    Raises:
        ConfigError: x is not float32 ``[n, q]``.
    """
    n, (p, q) = len(x), (len(codes), codes.shape[1] * (2 if bits == 4 else 1))
    if x.dtype != torch.float32 or tuple(x.shape) != (n, q):
        raise ConfigError(f"x must be float32 [n, {q}], not {x.dtype} {list(x.shape)}")
    products = _products([(p, q)], bits, activations)
    if products == "reference":
        return F.linear(x, codes.float() if scale is None else dequantise(codes, scale, bits, group))
    x, out = x.contiguous(), torch.empty(n, p)
    if not n:
        return out
    codes_at, rows = codes.data_ptr(), x.data_ptr()
    if products == "int8":
        rounded = torch.empty(n, stored_int8.row_bytes(bits, q), dtype=torch.uint8)
        _round(x, bits, group, rounded)
        rows = rounded.data_ptr()
    scale_at = 0 if scale is None else scale.data_ptr() - codes_at
    splits = _splits(p, 1, 1)
    numbers = (splits, splits, p, q, 0, scale_at, -1, rows, 0, out.data_ptr(), 0, 0, 1, codes_at, 0, n)
    launch(_kernel("product", bits, group, products), *numbers)
    return out
