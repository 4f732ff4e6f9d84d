"""Root-mean-square norms of one token in one call: transformers' own takes seven, and a decoder layer has up to four.

Legend: n rows of width d.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from collegium.experts.compute import cpu_kernels, stored_vectors
from collegium.experts.compute.cpu_kernels import _add_product, _int, _load, _next, _offset, _splat, _store
from collegium.experts.compute.cpu_pool import float_bits, run_here
from collegium.experts.compute.jit import LANES, cgutils, intrinsic, ir, missing, types
from collegium.experts.compute.stored_vectors import F32, I32, I64, VECTOR, call, compiled, lane_sum, spread

__all__ = ["FusedNorm", "fuse_norms", "norm_row"]

_PROBE_ROWS = 4
_FEW = 16
"""Most rows that one thread takes; for more, torch's threads are worth their calls."""


@intrinsic
def norm_row(typing: Any, x: Any, weight: Any, d: Any, eps: Any, out: Any) -> Any:
    """``out = weight * (x / sqrt(mean(x**2) + eps))`` with both factors of the product in bfloat16. `eps`: bits of a
    float32; d: a multiple of `LANES`."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, weight, d, eps, out = args
        total = cgutils.alloca_once_value(b, _splat(0.0, VECTOR))
        with cgutils.for_range_slice(b, _int(0), d, _int(LANES), I64) as (i, _):
            value = _load(b, _offset(b, x, i, 2), 2)
            b.store(_add_product(b, b.load(total), value, value), total)
        mean = b.fdiv(lane_sum(b, b.load(total)), b.sitofp(d, F32))
        root = call(b, "llvm.sqrt.f32", F32, b.fadd(mean, b.bitcast(b.trunc(eps, I32), F32)))
        factor = spread(b, b.fdiv(ir.Constant(F32, 1.0), root))
        with cgutils.for_range_slice(b, _int(0), d, _int(LANES), I64) as (i, _):
            place = _offset(b, out, i, 2)
            _store(b, b.fmul(_load(b, _offset(b, x, i, 2), 2), factor), place, 2)
            _store(b, b.fmul(_load(b, place, 2), _load(b, _offset(b, weight, i, 2), 2)), place, 2)
        return context.get_dummy_value()

    return types.void(x, weight, d, eps, out), generate


def norm_bfloat16(parameters: Any) -> None:
    """Parameters: counter, n, d, x ``[n, d]``, weight ``[d]``, bits of the epsilon, out ``[n, d]``."""
    n, d = parameters[1], parameters[2]
    while True:
        row = _next(parameters)
        if row >= n:
            break
        at = row * d * 2
        norm_row(parameters[3] + at, parameters[4], d, parameters[5], parameters[6] + at)


@functools.cache
def _kernel() -> int:
    return compiled(norm_bfloat16, cpu_kernels, stored_vectors)


def _norm(x: Tensor, weight: Tensor, eps: int) -> Tensor:
    out = torch.empty_like(x)
    d = weight.numel()
    run_here(_kernel(), x.numel() // d, d, x.data_ptr(), weight.data_ptr(), eps, out.data_ptr())
    return out


class FusedNorm:
    """Before the forward of a norm's own class."""

    fused = True
    weight: Tensor
    eps_bits: int

    def forward(self, hidden_states: Tensor) -> Tensor:
        few = hidden_states.numel() <= _FEW * self.weight.numel() and hidden_states.shape[-1] == self.weight.numel()
        if not few or hidden_states.dtype != torch.bfloat16 or not hidden_states.is_contiguous():
            found: Tensor = super().forward(hidden_states)  # type: ignore[misc]
            return found
        return _norm(hidden_states, self.weight, self.eps_bits)


@functools.cache
def _fused(kind: Any) -> Any:
    return type(kind.__name__, (FusedNorm, kind), {})


@torch.inference_mode()
def fuse_norms(model: nn.Module) -> None:
    """Let every norm of `model` that computes what `norm_row` does take one call where it has few rows. Which do is
    tried out, since each family has a class of its own. CPU and bfloat16, inference only."""
    if missing is not None or LANES == 4:
        return
    for module in model.modules():
        bits = _eps_bits(module)
        if bits is not None and _alike(module, bits):
            module.eps_bits = bits  # type: ignore[assignment]
            kind: Any = type(module)
            module.__class__ = _fused(kind)


def _eps_bits(module: Any) -> int | None:
    """The bits of a norm's epsilon; None for whatever cannot be such a norm."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    named = "norm" in type(module).__name__.lower() and not getattr(module, "fused", False)
    if not named or not isinstance(weight, Tensor) or not isinstance(eps, float) or weight.dim() != 1:
        return None
    alone = len([*module.parameters()]) == 1 and not [*module.children()]
    if not alone or weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or weight.numel() % LANES:
        return None
    return float_bits(eps)


def _alike(module: Any, eps: int) -> bool:
    """Equal but for what the order of a sum may round."""
    d = module.weight.numel()
    x = torch.randn(_PROBE_ROWS, d, generator=torch.Generator().manual_seed(0)).mul_(3).bfloat16()
    try:
        expected = module(x)
    except (TypeError, RuntimeError):  # it wants something else, too
        return False
    if not isinstance(expected, Tensor) or expected.dtype != x.dtype or expected.shape != x.shape:
        return False
    found, expected = _norm(x, module.weight, eps).float(), expected.float()
    return bool(torch.allclose(found, expected, rtol=2**-6, atol=1e-30)) and bool(
        (found == expected).float().mean() > 0.9
    )
