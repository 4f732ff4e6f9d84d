"""Grouped matrix products on the CPU: each group of rows with its own expert's matrix.

Legend: w ``[E, p, q]`` as stored (float32 or bfloat16); rows, s, x ``[n, .]`` float32; a group is ``(expert, first,
last)``, and the groups of a call cover its rows in order.

A group of few rows goes to a kernel that streams the matrix from memory once (`cpu_kernels`); all such groups share one
parallel region. A group of many rows goes to ``torch.mm`` in float32. bfloat16 matrices are widened first, which
is exact: torch multiplies bfloat16 at about 140 GFLOP/s on a CPU without matrix tiles (two cores, AVX-512) and float32
at 250, so widening pays for itself from some 64 rows on. Measured there, in GFLOP/s, for 2048 x 2048 matrices:

    rows                  1    4    8   16   32   64  128  512
    float32  torch.mm    13   29   45   97  155  211  239  267     kernel 15 49 83 130 180 215
    bfloat16 torch.mm    13   50   75  104  129  140  132  155     kernel 24 104 145 165 178 180
    bfloat16 widened      -    -    -   63  106  150  193  246
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collegium.experts.compute import cpu_kernels
from collegium.experts.compute.cpu_pool import launch

__all__ = ["LIMITS", "Group", "Products", "add_rows"]

Group = tuple[int, int, int]

LIMITS = {
    ("dot", torch.float32): 48,
    ("dot", torch.bfloat16): 96,
    ("sum", torch.float32): 12,
    ("sum", torch.bfloat16): 40,
    ("outer", torch.float32): 16,
    ("outer", torch.bfloat16): 64,
}
"""Most rows of a group that a kernel takes, by its matrix's dtype; more go to torch.mm. From such tables as above."""

_DOT_ITEM_ROWS = 192
_OUTER_ITEM_BYTES = 1 << 21  # a huge page: two threads that first touch the same one would wait for each other


class Products:
    """The three products of one pass over a layer; keeps one float32 buffer for widened matrices."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def _widened(self, matrix: Tensor) -> Tensor:
        if matrix.dtype == torch.float32:
            return matrix
        if self._buffer is None or self._buffer.shape != matrix.shape:
            self._buffer = torch.empty(matrix.shape, dtype=torch.float32)
        return self._buffer.copy_(matrix)

    def dot(self, rows: Tensor, w: Tensor, groups: Sequence[Group], out: Tensor) -> None:
        """``out [n, p] = rows [n, q] @ w[e].T``."""
        few, many = _split(groups, "dot", w)
        if few:
            _run("rows_dot", few, max(1, w.shape[1] // _DOT_ITEM_ROWS), w, rows, out)
        for e, first, last in many:
            torch.mm(rows[first:last], self._widened(w[e]).T, out=out[first:last])

    def sum(self, rows: Tensor, w: Tensor, groups: Sequence[Group], out: Tensor) -> None:
        """``out [n, q] = rows [n, p] @ w[e]``."""
        few, many = _split(groups, "sum", w)
        if few:  # long runs of memory are read faster, but every thread should have work
            out.zero_()
            splits = min(-(-4 * torch.get_num_threads() // len(few)), w.shape[2] // 256)
            _run("rows_sum", few, max(1, splits), w, rows, out)
        for e, first, last in many:
            torch.mm(rows[first:last], self._widened(w[e]), out=out[first:last])

    def outer(self, s: Tensor, x: Tensor, dw: Tensor, groups: Sequence[Group]) -> None:
        """``dw[e] = s.T @ x`` over the rows of each group, ``s [n, p]``, ``x [n, q]``; other experts are left alone."""
        few, many = _split(groups, "outer", dw)
        if few:
            size = dw[0].numel() * dw.element_size()
            splits = min(max(size // _OUTER_ITEM_BYTES, 1), dw.shape[1] // cpu_kernels.MIN_WIDTH)
            _run("outer", few, splits, dw, s, x)
        for e, first, last in many:
            if dw.dtype == torch.float32:
                torch.mm(s[first:last].T, x[first:last], out=dw[e])
            else:
                dw[e].copy_(torch.mm(s[first:last].T, x[first:last]))


def _split(groups: Sequence[Group], product: str, w: Tensor) -> tuple[list[Group], list[Group]]:
    limit = 0 if min(w.shape[1:]) < cpu_kernels.MIN_WIDTH else LIMITS[product, w.dtype]
    few = [group for group in groups if group[2] - group[1] <= limit]
    return few, [group for group in groups if group[2] - group[1] > limit]


def _run(kernel: str, groups: list[Group], splits: int, w: Tensor, a: Tensor, b: Tensor) -> None:
    _, p, q = w.shape
    kernel = f"{kernel}_{'float32' if w.dtype == torch.float32 else 'bfloat16'}"
    numbers = (len(groups) * splits, splits, p, q, w.data_ptr(), a.data_ptr(), b.data_ptr())
    launch(cpu_kernels.address(kernel), *numbers, *(number for group in groups for number in group))


def add_rows(y: Tensor, token: Tensor, rows: Tensor, weight: Tensor | None = None) -> None:
    """``y[token[i]] += weight[i] * rows[i]`` in the order of the rows; float32, weights 1 if not given."""
    n, d = rows.shape
    slices = max(1, min(d // 64, 4 * torch.get_num_threads()))
    weights = 0 if weight is None else weight.data_ptr()
    numbers = (slices, d, n, token.data_ptr(), weights, rows.data_ptr(), y.data_ptr())
    launch(cpu_kernels.address("combine"), *numbers)
