"""What surrounds the experts in a training step, on a CPU in float32: norms and attention by kernels of our own, equal
to transformers' within rounding.

A module's class is replaced by a subclass of it, so that parameters, names and checkpoints stay what they are. It runs
the original code wherever the kernels have no business: other devices and dtypes, autocast, a key-value cache.

Legend: B sequences, S positions, T = B * S tokens, d model width, H query heads and G key-value heads of D numbers
each, R = (H + 2 G) D; n rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from collegium.experts.compute.cpu_pool import float_bits, launch
from collegium.experts.compute.jit import LANES, missing
from collegium.train import attention_kernels, fused_kernels
from collegium.train.fused_kernels import ITEMS

__all__ = ["fuse_around_experts"]

_FAMILIES = ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe")
"""Whose attention projects, norms the heads if at all, rotates them whole, and attends."""
_LONGEST = 1024
"""Positions up to which scores stay in the cache; beyond, torch's attention, which takes keys in pieces."""


@torch.no_grad()
def fuse_around_experts(model: PreTrainedModel) -> int:
    """Replace, in place, norms by the root mean square and the attention of known families. Each module is compared
    with its replacement on random numbers first, and stays where the two differ.

    Args:
        model: a causal LM.

    Returns:
        how many modules were replaced; 0 without Numba, whose absence experts warn of.
    """
    if missing is not None:
        return 0
    before = [(module, type(module)) for module in model.modules() if not isinstance(module, _Norm | _Attention)]
    made: dict[type, Any] = {}
    for module, original in before:
        if original.__name__.endswith("RMSNorm") and _same_norm(module):
            _put(module, _Norm, made)
    if model.config.model_type in _FAMILIES and model.config._attn_implementation != "eager":
        for module, original in before:
            if original.__name__.endswith("Attention") and _same_attention(module, model):
                _put(module, _Attention, made)
    return sum(type(module) is not original for module, original in before)


def _put(module: nn.Module, fused: type, made: dict[type, Any]) -> None:
    """Make the module's class a subclass of `fused` and itself; `made` holds those there are."""
    original = type(module)
    if original not in made:
        # transformers looks for modules by the name of their class, and for functions beside it
        made[original] = type(original.__name__, (fused, original), {"__module__": original.__module__})
    module.__class__ = made[original]


def _plain(*tensors: Tensor) -> bool:
    """Whether the kernels take these."""
    return not torch.is_autocast_enabled("cpu") and all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors
    )


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def _launch(kernel: int, *parameters: int | Tensor) -> None:
    launch(kernel, *(p.data_ptr() if isinstance(p, Tensor) else p for p in parameters))


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fused norms and attention have no second derivative (create_graph=True); set run.fuse to false"
        )


# ---- norms -----------------------------------------------------------------------------------------------------------


class _Norm(nn.Module):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., d] -> [..., d]``."""
        if not _plain(hidden_states, self.weight):
            found: Tensor = super().forward(hidden_states)
            return found
        y: Tensor = _NormFunction.apply(hidden_states, self.weight, self.variance_epsilon)
        return y


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, d = x.contiguous(), len(weight)
        scale = torch.empty(x.numel() // d)
        y = torch.empty_like(x)
        _launch(fused_kernels.address("norm"), len(scale), d, x, weight, torch.tensor([eps]), y, scale)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        _refuse_second_derivative()
        x, weight, scale = ctx.saved_tensors
        d_x, d_weight = torch.empty_like(x), torch.zeros(ITEMS, len(weight))
        _launch(
            fused_kernels.address("norm_back"),
            len(scale),
            len(weight),
            x,
            weight,
            scale,
            grads[0].contiguous(),
            d_x,
            d_weight,
        )
        return d_x, d_weight.sum(0), None


def _same_norm(module: nn.Module) -> bool:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(eps, float) or not _plain(weight):
        return False
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, len(weight), generator=generator), torch.randn(len(weight), generator=generator)
    found = torch.func.functional_call(module, {"weight": w}, (x,))
    return _close(found, _NormFunction.apply(x, w, eps))


# ---- attention -------------------------------------------------------------------------------------------------------


class _Attention(nn.Module):
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, S, d] -> [B, S, d]``, and weights where the attention implementation gives some."""
        me: Any = self
        attend = AttentionInterface().get(me.config._attn_implementation)
        if attend is None or past_key_values is not None or not _plain(hidden_states, me.q_proj.weight):
            whole: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
            )
            return whole
        dropout = me.attention_dropout if self.training else 0.0
        states = _heads(me, hidden_states, *position_embeddings)
        causal = kwargs.get("is_causal") in (None, True)
        if me.config._attn_implementation == "sdpa" and causal and not dropout and _fits(states[0], attention_mask):
            y, weights = _AttendFunction.apply(*states, attention_mask, me.scaling), None
        else:
            y, weights = attend(self, *states, attention_mask, dropout=dropout, scaling=me.scaling, **kwargs)
        return me.o_proj(y.flatten(2)), weights


def _heads(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, H, S, D]``, keys and values ``[B, G, S, D]`` of ``x [B, S, d]``; cos and sin ``[1 or B, S, D]``."""
    weights = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
    scales = (None, None) if None in norms else (norms[0].weight, norms[1].weight)  # type: ignore[union-attr]
    eps = 0.0 if norms[0] is None else norms[0].variance_epsilon
    states: tuple[Tensor, Tensor, Tensor] = _HeadsFunction.apply(
        x, *weights, *scales, cos.contiguous(), sin.contiguous(), eps
    )
    return states


class _HeadsFunction(torch.autograd.Function):
    """Three projections as one product, then the norm and rotation of heads, each head where attention reads it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, nq: Tensor | None, nk: Tensor | None, cos: Tensor,
        sin: Tensor, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        B, S, D = len(x), x.shape[1], cos.shape[-1]
        rows = F.linear(x, torch.cat([wq, wk, wv]))
        states, scales = [], []
        epsilon, first = torch.tensor([eps]), 0
        for w, norm in ((wq, nq), (wk, nk)):
            H = len(w) // D
            out, scale = torch.empty(B, H, S, D), torch.empty(B * S * H)
            sizes = _sizes(rows, H, cos, norm)
            weight = torch.ones(D) if norm is None else norm
            _launch(fused_kernels.address("heads"), *sizes, rows[..., first:], weight, epsilon, cos, sin, out, scale)
            states.append(out)
            scales.append(scale)
            first += len(w)
        ctx.save_for_backward(x, wq, wk, wv, nq, nk, cos, sin, rows, *scales)
        return states[0], states[1], rows[..., first:].unflatten(-1, (-1, D)).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        x, wq, wk, wv, nq, nk, cos, sin, rows, *scales = ctx.saved_tensors
        D = cos.shape[-1]
        d_rows, first, d_norms = torch.empty_like(rows), 0, list[Tensor | None]()
        for w, norm, scale, grad in zip((wq, wk), (nq, nk), scales, grads, strict=False):
            sizes = _sizes(rows, len(w) // D, cos, norm)
            weight, d_norm = torch.ones(D) if norm is None else norm, torch.zeros(ITEMS, D)
            grad = grad if grad.stride(-1) == 1 else grad.contiguous()
            places = (rows[..., first:], weight, scale, cos, sin, grad, d_rows[..., first:], d_norm)
            _launch(fused_kernels.address("heads_back"), *sizes, *places, *grad.stride()[:3])
            d_norms.append(None if norm is None else d_norm.sum(0))
            first += len(w)
        d_rows[..., first:].unflatten(-1, (-1, D)).copy_(grads[2].transpose(1, 2))
        flat, d_weights = d_rows.flatten(0, 1), (None, None, None)
        if any(ctx.needs_input_grad[1:4]):
            d_weights = (flat.T @ x.flatten(0, 1)).split([len(wq), len(wk), len(wv)])
        d_x = (flat @ torch.cat([wq, wk, wv])).view_as(x) if ctx.needs_input_grad[0] else None
        return d_x, *d_weights, *d_norms, None, None, None


def _sizes(rows: Tensor, H: int, cos: Tensor, norm: Tensor | None) -> tuple[int, ...]:
    """The parameters of `heads` and `heads_back` before the addresses, for ``rows [B, S, R]``."""
    B, S, R = rows.shape
    D = cos.shape[-1]
    return B, S, H, D, R, int(norm is not None), 0 if len(cos) == 1 else S * D


def _fits(query: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernels attend for these heads ``[B, H, S, D]``."""
    B, _, S, D = query.shape
    if S % LANES or D % LANES or S > _LONGEST:
        return False
    return mask is None or (mask.dtype == torch.bool and mask.shape in ((B, 1, S, S), (1, 1, S, S)))


class _AttendFunction(torch.autograd.Function):
    """Attention of heads ``[B, H, S, D]`` to keys and values ``[B, G, S, D]``, causal or with a mask ``[B, 1, S, S]``;
    ``[B, S, H, D]``, as the layer after it takes it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        B, H, S, D = q.shape
        mask = None if mask is None else mask.expand(B, 1, S, S).contiguous()
        y = torch.empty(B, S, H, D)
        _attend("attend", (q, k, v, y.transpose(1, 2)), mask, scale)
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        q, k, v, mask = ctx.saved_tensors
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros(v.shape)
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        _attend("attend_back", (q, k, v, grad.transpose(1, 2), d_q, d_k, d_v), mask, ctx.scale)
        return d_q, d_k, d_v, None, None


def _attend(kernel: str, tensors: tuple[Tensor, ...], mask: Tensor | None, scale: float) -> None:
    """Run a kernel of attention on ``[B, heads, S, D]`` tensors, in the order of its parameters."""
    B, H, S, D = tensors[0].shape
    G, room = tensors[1].shape[1], attention_kernels.scratch_floats(S, D)
    threads, scratch = torch.zeros(1, dtype=torch.int64), torch.empty(torch.get_num_threads(), room)
    places = [number for one in tensors for number in (one.data_ptr(), *one.stride()[:3])]
    sizes = (B, S, G, H // G, D, float_bits(scale), torch.tensor([scale]))
    _launch(attention_kernels.address(kernel), *sizes, 0 if mask is None else mask, threads, scratch, room, *places)


def _same_attention(attention: Any, model: Any) -> bool:
    projections = [getattr(attention, f"{name}_proj", None) for name in "qkv"]
    if not all(isinstance(one, nn.Linear) and one.bias is None and _plain(one.weight) for one in projections):
        return False
    norms = [module for name, module in attention.named_children() if name.endswith("norm")]
    if not all(isinstance(norm, _Norm) and len(norm.weight) == attention.head_dim for norm in norms):
        return False
    if len(norms) not in (0, 2) or getattr(attention, "sliding_window", None):
        return False
    x = torch.randn(2, LANES, projections[0].in_features, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    places = model.get_decoder().rotary_emb(x, torch.arange(2 * LANES).view(2, LANES))
    if places[0].shape[-1] != attention.head_dim:
        return False
    training = attention.training
    attention.eval()  # dropout would tell them apart
    expected = attention(hidden_states=x, position_embeddings=places, attention_mask=None)[0]
    found = _Attention.forward(attention, x, places)[0]
    attention.train(training)
    return _close(found, expected)
