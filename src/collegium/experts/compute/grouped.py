"""The portable back end: torch's grouped matrix product on rows sorted by expert.

Legend: A rows sorted by expert, E experts. ``torch.nn.functional.grouped_mm`` has traps that this file takes care of:

* every stride must be a multiple of 16 bytes, which odd widths break: those layers run one expert after the other;
* an expanded gradient (``y.sum().backward()``) is refused: it is made contiguous;
* rows beyond the last offset are not written: they are cut off beforehand;
* it does not follow autocast: rows are cast to the dtype of the weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.experts.compute.rows import run_rows
from collegium.experts.weights import ExpertWeights
from collegium.routing.record import Routing

try:
    from torch.nn.functional import grouped_mm
except ImportError:  # torch 2.9 has it under this name only
    from torch import _grouped_mm as grouped_mm  # type: ignore[assignment]

__all__ = ["grouped", "why_not"]

_ALIGNMENT = 16


def why_not(x: Tensor, weights: ExpertWeights) -> str | None:
    """Why this back end cannot run these tensors, or None when it can."""
    if weights.up.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"torch.nn.functional.grouped_mm takes float32, bfloat16 or float16, not {weights.up.dtype}"
    return None


class _Contiguous(torch.autograd.Function):
    """The identity, with a gradient that is laid out row by row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _product(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """``rows [A, in] @ matrices [E, in, out]``, each row with its expert's matrix."""
    size = rows.element_size()
    if any(width * size % _ALIGNMENT for width in matrices.shape[1:]):
        parts = rows.tensor_split(offsets[:-1].cpu().long())
        return torch.cat([part @ matrix for part, matrix in zip(parts, matrices.unbind(0), strict=True)])
    if rows.data_ptr() % _ALIGNMENT or matrices.data_ptr() % _ALIGNMENT:  # weights mapped from a file may be anywhere
        rows, matrices = rows.clone(), matrices.clone()
    product: Tensor = _Contiguous.apply(grouped_mm(rows.contiguous(), matrices, offs=offsets))
    return product


def _linear(offsets: Tensor, expert: Tensor, transposed: bool, rows: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    out = _product(rows.to(w.dtype), w if transposed else w.transpose(1, 2), offsets)
    return out if bias is None else out + bias.index_select(0, expert)


@method("grouped", kind="compute", paper="MegaBlocks (2022)", arxiv="2211.15841")
def grouped(x: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Run the experts through ``torch.nn.functional.grouped_mm``, on any device that has it.

    Args:
        x: ``[T, d]``; cast to the weights' dtype.
        routing: any record; ragged, and with dropped assignments.
        weights: float32, bfloat16 or float16, any layout.

    Returns:
        ``[T, d]`` in x's dtype; the products are in the weights' dtype, the sum over a token's experts in float32.
    """
    edges = routing.dispatch().offsets[: weights.num_experts + 1]
    counts = edges.diff()
    expert = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    linear = partial(_linear, edges[1:].to(torch.int32), expert, weights.transposed)
    return run_rows(x, routing, weights, linear)
