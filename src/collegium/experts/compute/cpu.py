"""The fast CPU back end: streaming kernels for few rows, float32 matrix products for many, and a lean backward.

Legend: T tokens, E experts, A assignments sorted by expert, d model width, f expert width, u = 2f for gated experts.

The backward pass keeps only x, the pre-activations ``[A, u]`` and the combine weights. The gradient of a combine weight
is ``<dy @ down, h>``, so no expert's output is kept either (SonicMoE, 2025). Rows are handled in chunks of whole
experts, whose intermediate results stay in the cache and whose memory is used again and again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.experts.activations import KNOWN
from collegium.experts.compute.cpu_memory import gradient_like, lazy_zeros
from collegium.experts.compute.cpu_products import Group, Products, add_rows
from collegium.experts.compute.jit import missing
from collegium.experts.compute.rows import bounds, run_rows
from collegium.experts.weights import ExpertWeights
from collegium.routing.record import Routing

__all__ = ["cpu", "why_not"]

CHUNK_ROWS = 512
"""Whole experts are taken together until they have this many rows."""


def why_not(x: Tensor, weights: ExpertWeights) -> str | None:
    """Why this back end cannot run these tensors, or None when it can."""
    if missing is not None:
        return f"Numba is not usable here ({missing})"
    if x.device.type != "cpu" or weights.up.device.type != "cpu":
        return f"it runs on the CPU only, x is on {x.device} and the weights on {weights.up.device}"
    if weights.up.dtype not in (torch.float32, torch.bfloat16) or weights.down.dtype != weights.up.dtype:
        return f"it takes float32 or bfloat16 weights, not {weights.up.dtype} and {weights.down.dtype}"
    if x.dtype == torch.float64:
        return "it computes in float32 and x is float64"
    return None


@dataclass(frozen=True)
class _Chunk:
    """Whole experts whose rows are handled together; the groups count rows from the chunk's first."""

    rows: slice
    groups: list[Group]


@dataclass(frozen=True)
class _Plan:
    """Everything about a call that is not differentiated."""

    chunks: list[_Chunk]
    token: Tensor
    order: Tensor
    transposed: bool
    gated: bool
    activation: str
    save: bool

    @property
    def longest(self) -> int:
        """Rows of the longest chunk."""
        return max((chunk.rows.stop - chunk.rows.start for chunk in self.chunks), default=0)


def _chunks(edges: list[int]) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    groups: list[Group] = []
    first = 0
    for e, (start, stop) in enumerate(pairwise(edges)):
        if start < stop:
            groups.append((e, start - first, stop - first))
        if groups and (stop - first >= CHUNK_ROWS or e == len(edges) - 2):
            chunks.append(_Chunk(slice(first, stop), groups))
            groups, first = [], stop
    return chunks


def _plan(routing: Routing, weights: ExpertWeights) -> _Plan:
    dispatch = routing.dispatch()
    edges = bounds(routing, weights.num_experts)
    token, order = dispatch.token[: edges[-1]].contiguous(), dispatch.order[: edges[-1]]
    activation, save = weights.fused_activation or "", torch.is_grad_enabled()
    return _Plan(_chunks(edges), token, order, weights.transposed, weights.gated, activation, save)


class _Layer:
    """The linear maps and the activation of one call, forward and backward, on the rows of a chunk."""

    def __init__(self, transposed: bool, gated: bool = True, activation: str = "silu") -> None:
        self.products, self.transposed, self.gated = Products(), transposed, gated
        self.act = KNOWN[activation]

    def linear(self, rows: Tensor, w: Tensor, bias: Tensor | None, groups: list[Group], out: Tensor) -> Tensor:
        product = self.products.sum if self.transposed else self.products.dot
        product(rows, w, groups, out)
        if bias is not None:
            for e, first, last in groups:
                out[first:last] += bias[e]
        return out

    def linear_back(self, grad: Tensor, w: Tensor, groups: list[Group], out: Tensor) -> Tensor:
        product = self.products.dot if self.transposed else self.products.sum
        product(grad, w, groups, out)
        return out

    def weight_gradient(self, rows: Tensor, grad: Tensor, dw: Tensor, groups: list[Group]) -> None:
        s, x = (rows, grad) if self.transposed else (grad, rows)
        self.products.outer(s, x, dw, groups)

    def activate(self, pre: Tensor) -> Tensor:
        if not self.gated:
            return self.act.value(pre)
        gate, up = pre.chunk(2, 1)
        return self.act.value(gate).mul_(up)

    def activate_back(self, grad: Tensor, pre: Tensor) -> Tensor:
        if not self.gated:
            return self.act.gradient(grad, pre)
        gate, up = pre.chunk(2, 1)
        out = torch.empty_like(pre)
        d_gate, d_up = out.chunk(2, 1)
        torch.mul(grad, self.act.value(gate), out=d_up)
        d_gate.copy_(self.act.gradient(grad * up, gate))
        return out


class _Experts(torch.autograd.Function):
    """Experts with a known activation and no norm after them. See `cpu` for the arguments."""

    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, x: Tensor, weight: Tensor, up: Tensor, down: Tensor, *bias: Tensor | None
    ) -> Tensor:
        layer = _Layer(plan.transposed, plan.gated, plan.activation)
        x32, weight_rows = x.float(), weight.float()[plan.order]
        u, n, d = up.shape[2 if plan.transposed else 1], plan.longest, x.shape[1]
        rows, out = torch.empty(n, d), torch.empty(n, d)
        pre_rows = lazy_zeros((len(plan.token), u)) if plan.save else torch.empty(n, u)
        y = torch.zeros(x.shape)
        for chunk in plan.chunks:
            token, groups = plan.token[chunk.rows], chunk.groups
            own = slice(0, len(token))
            torch.index_select(x32, 0, token, out=rows[own])
            pre = layer.linear(rows[own], up, bias[0], groups, pre_rows[chunk.rows if plan.save else own])
            layer.linear(layer.activate(pre), down, bias[1], groups, out[own])
            add_rows(y, token, out[own], weight_rows[chunk.rows])
        if plan.save:
            ctx.plan = plan
            ctx.save_for_backward(x, weight, up, down, *bias, pre_rows)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        with torch.autocast("cpu", enabled=False):
            return None, *_Backward(ctx).run(dy)


class _Backward:
    """One backward pass: the gradients that somebody needs, filled in chunk by chunk."""

    def __init__(self, ctx: Any) -> None:
        self.plan: _Plan = ctx.plan
        self.x, self.weight, self.up, self.down, self.up_bias, self.down_bias, self.pre_rows = ctx.saved_tensors
        _, need_x, need_weight, need_up, need_down, need_up_bias, need_down_bias = ctx.needs_input_grad
        n, d = self.plan.longest, self.x.shape[1]
        self.rows, self.grad, self.d_rows = torch.empty(n, d), torch.empty(n, d), torch.empty(n, d)
        self.d_hidden = torch.empty(n, self.down.shape[1 if self.plan.transposed else 2])
        self.d_x = torch.zeros(self.x.shape) if need_x else None
        self.d_weight_rows = torch.zeros(len(self.plan.token)) if need_weight else None
        hit = [e for chunk in self.plan.chunks for e, _, _ in chunk.groups]
        self.d_up = gradient_like(self.up, hit) if need_up else None
        self.d_down = gradient_like(self.down, hit) if need_down else None
        self.d_up_bias = torch.zeros(self.up_bias.shape) if need_up_bias else None
        self.d_down_bias = torch.zeros(self.down_bias.shape) if need_down_bias else None
        self.need_pre = need_x or need_up or need_up_bias
        self.layer = _Layer(self.plan.transposed, self.plan.gated, self.plan.activation)

    def run(self, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, up, down, up_bias, down_bias; None where nobody asked."""
        x, dy, weight_rows = self.x.float(), dy.float(), self.weight.float()[self.plan.order]
        for chunk in self.plan.chunks:
            grad = self.grad[: chunk.rows.stop - chunk.rows.start]
            torch.index_select(dy, 0, self.plan.token[chunk.rows], out=grad)
            d_hidden = self._through_down(chunk, grad, weight_rows[chunk.rows, None])
            if d_hidden is not None:
                self._through_up(chunk, d_hidden, x)
        d_weight = None
        if self.d_weight_rows is not None:
            d_weight = torch.zeros(self.weight.shape).index_copy_(0, self.plan.order, self.d_weight_rows)
        gradients = (self.d_x, self.x), (d_weight, self.weight), (self.d_up, self.up), (self.d_down, self.down)
        biases = (self.d_up_bias, self.up_bias), (self.d_down_bias, self.down_bias)
        return tuple(None if g is None else g.to(like.dtype) for g, like in (*gradients, *biases))

    def _through_down(self, chunk: _Chunk, grad: Tensor, scale: Tensor) -> Tensor | None:
        """From dy of each row (`grad`, overwritten) to the gradient of the hidden rows, if somebody needs it."""
        groups, layer, pre = chunk.groups, self.layer, self.pre_rows[chunk.rows]
        hidden = layer.activate(pre) if self.d_weight_rows is not None or self.d_down is not None else pre
        d_hidden = None
        if self.need_pre or self.d_weight_rows is not None:
            d_hidden = layer.linear_back(grad, self.down, groups, self.d_hidden[: len(grad)])
        if self.d_weight_rows is not None and d_hidden is not None:
            torch.sum(d_hidden * hidden, 1, out=self.d_weight_rows[chunk.rows])
            if self.down_bias is not None:
                for e, first, last in groups:
                    self.d_weight_rows[chunk.rows][first:last] += grad[first:last] @ self.down_bias[e].float()
        grad.mul_(scale)
        if self.d_down is not None:
            layer.weight_gradient(hidden, grad, self.d_down, groups)
        _add_sums(self.d_down_bias, grad, groups)
        return d_hidden.mul_(scale) if self.need_pre and d_hidden is not None else None

    def _through_up(self, chunk: _Chunk, d_hidden: Tensor, x: Tensor) -> None:
        token, groups = self.plan.token[chunk.rows], chunk.groups
        d_pre = self.layer.activate_back(d_hidden, self.pre_rows[chunk.rows])
        _add_sums(self.d_up_bias, d_pre, groups)
        if self.d_up is not None:
            rows = torch.index_select(x, 0, token, out=self.rows[: len(token)])
            self.layer.weight_gradient(rows, d_pre, self.d_up, groups)
        if self.d_x is not None:
            d_rows = self.layer.linear_back(d_pre, self.up, groups, self.d_rows[: len(token)])
            add_rows(self.d_x, token, d_rows)


def _refuse_second_derivative() -> None:
    # once_differentiable lets the commonest case pass: after y.sum() it would be taken for zero
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the 'cpu' back end of experts has no second derivative (create_graph=True); choose compute='reference'"
        )


def _add_sums(bias_gradient: Tensor | None, rows: Tensor, groups: list[Group]) -> None:
    if bias_gradient is not None:
        for e, first, last in groups:
            bias_gradient[e] += rows[first:last].sum(0)


class _Linear(torch.autograd.Function):
    """Each row with its expert's matrix, for layers whose activation only torch can differentiate."""

    @staticmethod
    def forward(
        ctx: Any, groups: list[Group], transposed: bool, rows: Tensor, w: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.groups, ctx.transposed = groups, transposed
        ctx.save_for_backward(rows, w)
        return _Layer(transposed).linear(rows, w, bias, groups, torch.empty(len(rows), w.shape[2 if transposed else 1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        (rows, w), layer, groups = ctx.saved_tensors, _Layer(ctx.transposed), ctx.groups
        _, _, need_rows, need_w, need_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        d_rows = layer.linear_back(grad, w, groups, torch.empty_like(rows)) if need_rows else None
        d_w = gradient_like(w, [e for e, _, _ in groups]) if need_w else None
        if d_w is not None:
            layer.weight_gradient(rows, grad, d_w, groups)
        d_bias = torch.zeros(len(w), grad.shape[1]) if need_bias else None
        _add_sums(d_bias, grad, groups)
        return None, None, d_rows, d_w, None if d_bias is None else d_bias.to(w.dtype)


@method("cpu", kind="compute", paper="SonicMoE (2025)", arxiv="2512.14080")
@torch.compiler.disable
def cpu(x: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Run the experts on the CPU, reading each hit expert's weights once.

    All arithmetic is in float32 and only the results are rounded to the dtypes of x and of the weights, so with
    bfloat16 weights it is more exact than bfloat16 matrix products, and it is the same with and without autocast.
    Gradients of the weights are dense, as autograd wants them; see `cpu_memory` for where their memory comes from.
    A second derivative raises RuntimeError.

    Args:
        x: ``[T, d]``, any floating dtype but float64.
        routing: any record; ragged, and with dropped assignments.
        weights: float32 or bfloat16, any layout. Non-contiguous matrices are copied.

    Returns:
        ``[T, d]`` in x's dtype.
    """
    up, down = weights.up.contiguous(), weights.down.contiguous()
    if weights.fused_activation in KNOWN and weights.post_norm is None:
        bias = weights.up_bias, weights.down_bias
        y: Tensor = _Experts.apply(_plan(routing, weights), x, routing.weight, up, down, *bias)
        return y
    edges = bounds(routing, weights.num_experts)
    groups = [(e, a, b) for e, (a, b) in enumerate(pairwise(edges)) if a < b]

    def linear(rows: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return _Linear.apply(groups, weights.transposed, rows.float().contiguous(), w, bias)

    return run_rows(x, routing, replace(weights, up=up, down=down), linear)
