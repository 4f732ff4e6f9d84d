"""Decoder layers and routers that take one token in two launches and one.

A layer is taken if it has the usual parts: a norm, maps to queries, keys and values with or without norms and rotary
positions, attention, an output map, a norm, and an MLP or MoE block, each added to the residual stream. Whether it
really computes that is tried out on random tokens, and so is what a router does: families differ in more than names.

Legend: d model width, D head width, H query heads, G key-value heads, E experts, K slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from collegium.experts.compute import stored_int8
from collegium.experts.compute.cpu_pool import float_bits, launch
from collegium.experts.compute.jit import LANES, missing
from collegium.experts.compute.stored_kernels import BLOCK, ITEM_ROWS
from collegium.models.attention_kernel import fits, numbers_of, scratch_scores
from collegium.offload.fused_kernels import MOST_EXPERTS, WIDEST, address
from collegium.offload.linear import RoundedLinear, StreamedLinear
from collegium.offload.norm import FusedNorm
from collegium.sites import Site

__all__ = ["fuse_layers", "fuse_routers"]

_PROBES, _PROBE_TOKENS = 2, 27
_ALIKE = 0.03
"""Most that what a layer adds to the residual stream may differ between its own forward and ours, as a share of its
norm: they round differently."""


def fuse_layers(model: Any, layers: Any) -> int:
    """Let every decoder layer that is of the usual kind take one token in two launches; how many those are. CPU,
    bfloat16, inference only; its norms and linear maps were taken care of before. The experts compute zeros, or
    anything that stays the same."""
    # the products of 8-bit matrices are compiled into the same kernels as those of others
    if stored_int8.why_not() is not None:
        return 0
    rotary = next((one for one in model.modules() if type(one).__name__.endswith("RotaryEmbedding")), None)
    fused = 0
    for number, layer in enumerate(layers):
        if rotary is not None and _usual(layer) and _computes_that(model, rotary, layer, number):
            kind: Any = type(layer)
            layer.__class__ = _fused_layer(kind)
            fused += 1
    return fused


# ---- a layer ---------------------------------------------------------------------------------------------------------


class _FusedLayer:
    """Before the forward of a decoder layer's own class."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        layer: Any = self
        cache, positions = kwargs.get("past_key_values"), kwargs.get("position_embeddings")
        one = hidden_states.numel() == hidden_states.shape[-1] and hidden_states.dtype == torch.bfloat16
        plain = kwargs.get("attention_mask") is None and not kwargs.get("output_attentions")
        watched = layer.self_attn._forward_hooks or layer.self_attn._forward_pre_hooks
        if one and plain and cache is not None and positions is not None and not watched:
            found = _attend(layer, hidden_states.contiguous(), positions, cache)
            if found is not None:
                return found[0] + layer.mlp(found[1])
        return super().forward(hidden_states, **kwargs)  # type: ignore[misc]


@functools.cache
def _fused_layer(kind: Any) -> Any:
    return type(kind.__name__, (_FusedLayer, kind), {})


class _Parts:
    """The constant parameters of a layer's two launches."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        maps = [getattr(attention, f"{name}_proj") for name in "qkvo"]
        self.eight = isinstance(maps[0], RoundedLinear)
        self.head = int(attention.head_dim)
        self.sizes = [one.out_features for one in maps]
        self.matrices = [_matrix(one) for one in maps]
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        self._kept = [*layer.parameters(), *layer.buffers()]  # what the addresses below are of
        self.first = (first.weight.data_ptr(), first.eps_bits)
        self.second = (second.weight.data_ptr(), second.eps_bits)
        norms = [getattr(attention, f"{name}_norm", None) for name in "qk"]
        self.norms = [
            number
            for one in norms
            for number in ((0, 0, 0) if one is None else (one.weight.data_ptr(), one.weight.numel(), one.eps_bits))
        ]
        self.scale = float_bits(float(attention.scaling))
        self.index = int(attention.layer_idx)
        suffix = "8" if self.eight else "16"
        self.before, self.after = address(f"before_{suffix}"), address(f"after_{suffix}")


def _matrix(one: Any) -> tuple[Callable[[int], tuple[int, ...]], int]:
    """The numbers of a map without and with its result's address, and how many items it has."""
    p, items = one.out_features, max(1, one.out_features // ITEM_ROWS)
    weights = one.codes.data_ptr() if isinstance(one, RoundedLinear) else one.weight.data_ptr()
    scales = one.scale.data_ptr() if isinstance(one, RoundedLinear) else 0
    bias = 0 if one.bias is None else one.bias.data_ptr()
    return lambda out: (p, weights, scales, bias, out, items), items


def _attend(layer: Any, x: Tensor, positions: Any, cache: Any) -> tuple[Tensor, Tensor] | None:
    """The residual stream after attention and its norm, both like x; None, with the cache as it was, where attention
    takes another way."""
    parts = layer.__dict__.get("_parts")
    if parts is None:
        parts = layer.__dict__["_parts"] = _Parts(layer)
    d, D = x.shape[-1], parts.head
    cos, sin = positions
    r = cos.shape[-1]
    if cos.dtype != torch.bfloat16 or cos.numel() != r or sin.numel() != r or r > D or r % (2 * LANES):
        return None
    q, k, v = (torch.empty(1, size // D, 1, D, dtype=torch.bfloat16) for size in parts.sizes[:3])
    three = parts.matrices[:3]
    numbers = [number for (make, _), out in zip(three, (q, k, v), strict=True) for number in make(out.data_ptr())]
    items = sum(count for _, count in three)
    turn = (r, cos.contiguous().data_ptr(), sin.contiguous().data_ptr())
    launch(parts.before, items, 0, 0, d, x.data_ptr(), *parts.first, D, *turn, *parts.norms, *numbers)
    keys, values = cache.update(k, v, parts.index)
    if not fits(q, keys, values):  # few keys, or a cache of another kind
        attended = F.scaled_dot_product_attention(q, keys, values, scale=layer.self_attn.scaling, enable_gqa=True)
        out = x + layer.self_attn.o_proj(attended.reshape((*x.shape[:-1], -1)))
        return out, layer.post_attention_layernorm(out)
    attended, out, normed = torch.empty_like(q), torch.empty_like(x), torch.empty_like(x)
    make, _ = parts.matrices[3]
    scores = scratch_scores(keys)
    attention = numbers_of(q.view(-1, D), keys, values, parts.scale, scores, attended)
    head = (0, d, *parts.second, x.data_ptr(), normed.data_ptr(), 0, attended.numel(), *make(out.data_ptr()))
    launch(parts.after, *head, 0, *attention)
    return out, normed


def _usual(layer: Any) -> bool:
    """Whether a layer has the parts of the usual kind, in sizes that the kernels take."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    norms = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    if attention is None or not isinstance(mlp, nn.Module) or {attention, mlp, *norms} != {*layer.children()}:
        return False
    maps = [getattr(attention, f"{name}_proj", None) for name in "qkvo"]
    own = [one for name in "qk" if (one := getattr(attention, f"{name}_norm", None)) is not None]
    D: Any = getattr(attention, "head_dim", None)
    known = {*maps, *own} == {*attention.children()} and isinstance(D, int) and hasattr(attention, "scaling")
    if not known or not all(isinstance(one, FusedNorm) for one in (*norms, *own)):
        return False
    kinds = {type(one) for one in maps}
    if kinds not in ({RoundedLinear}, {StreamedLinear}) or getattr(attention, "sliding_window", None) is not None:
        return False
    return all(_takes(one, D) for one in maps) and all(one.weight.numel() % D == 0 for one in own)


def _takes(one: Any, D: int) -> bool:
    p, q = one.out_features, one.in_features
    rounded = not isinstance(one, RoundedLinear) or one.one
    bias = one.bias is None or one.bias.dtype == torch.bfloat16
    return rounded and bias and not (p % BLOCK or q % BLOCK or (p % D and q % D)) and q <= WIDEST


@torch.inference_mode()
def _computes_that(model: Any, rotary: Any, layer: Any, number: int) -> bool:
    """Whether a layer adds to the residual stream, and tells its MLP, what our forward does."""
    d = layer.input_layernorm.weight.numel()
    kind: Any = type(layer)
    generator = torch.Generator().manual_seed(number)
    told: list[Tensor] = []

    def answer(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Stand in for the experts, which are not there yet."""
        told.append(args[0])
        return args[0].flip(-1) if isinstance(output, Tensor) else output

    hook = layer.mlp.register_forward_hook(answer)
    try:
        for _ in range(_PROBES):
            tokens = torch.randn(1, _PROBE_TOKENS, d, generator=generator).bfloat16()
            told.clear()
            outputs = [_last(model, rotary, layer, one, tokens) for one in (kind, _fused_layer(kind))]
            if not all(isinstance(one, Tensor) for one in outputs) or len(told) != 4:
                return False
            own, ours = (one.float() - tokens[:, -1:].float() for one in outputs)
            if any(_apart(*pair) > _ALIKE for pair in ((own, ours), (told[1].float(), told[3].float()))):
                return False
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
        return False  # it is called in another way
    finally:
        hook.remove()
        layer.__dict__.pop("_parts", None)
    return True


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm())


def _last(model: Any, rotary: Any, layer: Any, kind: Any, tokens: Tensor) -> Any:
    """What a layer of class `kind` gives for the last token after the others."""
    own, cache = type(layer), DynamicCache(config=model.config)
    n = tokens.shape[1]
    index = int(layer.self_attn.layer_idx)
    layer.__class__ = kind
    try:
        for part, positions in ((tokens[:, :-1], range(n - 1)), (tokens[:, -1:], range(n - 1, n))):
            ids = torch.tensor([list(positions)])
            found = layer(
                part,
                attention_mask=None,
                position_ids=ids,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary(part, ids),
            )
        if cache.get_seq_length(index) != n:
            raise ValueError("the layer does not append to the cache")
    finally:
        layer.__class__ = own
    return found


# ---- a router --------------------------------------------------------------------------------------------------------


def fuse_routers(found: list[Site]) -> None:
    """Let every router that is a softmax over one map, and its K largest, take one token in one launch. Inference."""
    if missing is not None or LANES == 4:
        return
    for site in found:
        gate: Any = site.gate
        kept = _kept(gate) if _plain(gate) else None
        if kept is not None:
            gate._adds_up, gate._result = kept
            kind: Any = type(gate)
            gate.__class__ = _fused_router(kind)


def _plain(gate: Any) -> bool:
    weight, K = getattr(gate, "weight", None), getattr(gate, "top_k", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype != torch.bfloat16 or not isinstance(K, int):
        return False
    E, d = weight.shape
    alone = len([*gate.parameters()]) == 1 and not [*gate.buffers()] and not [*gate.children()]
    return alone and not (E % BLOCK or d % BLOCK) and 0 < K <= E <= MOST_EXPERTS and d <= WIDEST


@torch.inference_mode()
def _kept(gate: Any) -> tuple[bool, torch.dtype] | None:
    """Whether the weights add up to 1, and their dtype; None where the router does something else."""
    x = torch.randn(16, gate.weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = (
        x / (x @ gate.weight.float().T).std()
    ).bfloat16()  # shares of about one size tell whether they are made up to 1
    try:
        expected = [gate(row[None]) for row in x]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    if not all(isinstance(one, tuple) and len(one) == 3 for one in expected):
        return None
    dtype = expected[0][1].dtype
    for adds_up in (False, True):
        pairs = zip((_route(gate, row[None], adds_up, dtype) for row in x), expected, strict=True)
        if all(_same(ours, theirs) for ours, theirs in pairs):
            return adds_up, dtype
    return None


def _same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(ours, theirs, strict=True)):
        return False
    logits = torch.allclose(ours[0].float(), theirs[0].float(), rtol=2**-6, atol=1e-2)
    rank = [one[1][0, one[2][0].argsort()] for one in (ours, theirs)]
    # a pair of experts whose logits round alike may come in either order, and the last one may be either of two
    ids = len({*ours[2][0].tolist()} & {*theirs[2][0].tolist()}) >= ours[2].shape[1] - 1
    return logits and ids and torch.allclose(rank[0].float().sum(), rank[1].float().sum(), rtol=2e-2)


class _FusedRouter:
    """Before the forward of a router's own class."""

    _adds_up: bool
    _result: torch.dtype

    def forward(self, hidden_states: Tensor) -> Any:
        gate: Any = self
        if hidden_states.numel() != gate.weight.shape[1] or hidden_states.dtype != torch.bfloat16:
            return super().forward(hidden_states)  # type: ignore[misc]
        return _route(gate, hidden_states.reshape(1, -1).contiguous(), self._adds_up, self._result)


@functools.cache
def _fused_router(kind: Any) -> Any:
    return type(kind.__name__, (_FusedRouter, kind), {})


def _route(gate: Any, x: Tensor, adds_up: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[1, E]``, weights and ids ``[1, K]`` of one token ``[1, d]``."""
    (E, d), K = gate.weight.shape, gate.top_k
    logits, weights = torch.empty(1, E, dtype=x.dtype), torch.empty(1, K)
    ids = torch.empty(1, K, dtype=torch.int64)
    items = min(E // BLOCK, 4)
    sizes = (E, d, x.data_ptr(), gate.weight.data_ptr(), K, int(adds_up))
    launch(address("route"), items, 0, 0, *sizes, logits.data_ptr(), weights.data_ptr(), ids.data_ptr())
    return logits, weights.to(dtype), ids
