"""What routers need of a decoder: memory that goes with a key-value cache, and averages by a layer's attention.

Legend: B sequences, S new tokens, P tokens of the past, H heads, G key-value heads, D head width, n values of a token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.layer import MoE
from collegium.routing import check_parts

__all__ = ["give_memory", "give_mixing", "refuse_decoding"]

NAME = "collegium_mixing"
"""Of the attention implementation that lets routers average by it, before the name of what it wraps."""

_ABLE = ("sdpa", "eager")


# ---- memory ----------------------------------------------------------------------------------------------------------


def give_memory(model: PreTrainedModel, layers: list[MoE]) -> None:
    """Let every layer's routers keep what they want of a sequence for as long as its key-value cache lives."""
    known: WeakKeyDictionary[Any, list[dict[str, Tensor]]] = WeakKeyDictionary()
    now: list[dict[str, Tensor]] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if past and cache not in known:
            raise ConfigError("the cache holds tokens that these routers have not seen; begin with an empty one")
        now[:] = known[cache] if past else [{} for _ in layers]
        for layer, memory in zip(layers, now, strict=True):
            layer.memory = None if module.training else memory

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            known[cache] = list(now)

    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(begin, with_kwargs=True)
    decoder.register_forward_hook(end, with_kwargs=True)


def refuse_decoding(model: PreTrainedModel, layers: list[MoE]) -> None:
    """Let the model refuse to go on from a key-value cache where a router needs the tokens that are not there yet.
    Whole sequences can still be evaluated."""

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            check_parts([part for layer in layers for part in layer.gate.parts], causal_decoding=True)

    model.get_decoder().register_forward_pre_hook(begin, with_kwargs=True)


# ---- averages by attention -------------------------------------------------------------------------------------------


def give_mixing(model: PreTrainedModel, pairs: list[tuple[MoE, nn.Module]]) -> None:
    """Let each layer's router average over tokens as the attention module beside it does.

    Raises:
        ConfigError: the model's attention gives neither queries and keys nor a mask that can be used again.
        UnsupportedFamilyError: the family does not attend through transformers' attention interface.
    """
    own = model.config._attn_implementation
    if own not in _ABLE:
        raise ConfigError(
            f"a router that averages by attention needs attention implementation {' or '.join(_ABLE)}; the model has "
            f"{own!r}: load it with attn_implementation={_ABLE[0]!r}"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedFamilyError(
            f"{type(model).__name__} does not attend through transformers' attention interface, so its routers cannot "
            "average by it"
        )
    name = f"{NAME}_{own}"
    AttentionInterface.register(name, _noting(own))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == own:
            # past the setter, which would also write to the configs of parts
            config._attn_implementation_internal = name
    for layer, attention in pairs:
        attention.notes_for_routers = True  # type: ignore[assignment]
        layer.mixing = lambda layer=layer, attention=attention: _mix(layer, attention)


def _noting(own: str) -> Callable[..., Any]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        """The model's own attention; queries, keys and mask are kept until the router has asked."""
        if getattr(module, "notes_for_routers", False):
            module.noted = (query, key, attention_mask, kwargs.get("scaling"))  # type: ignore[assignment]
        if own == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = AttentionInterface()[own]
        return function(module, query, key, value, attention_mask, **kwargs)

    return attend


def _mix(layer: MoE, attention: Any) -> Callable[[Tensor], Tensor]:
    """``values [T, n] -> [T, n]``, averaged as the attention that has just run did, over all of its heads."""
    query, key, mask, scaling = attention.noted
    B, H, S, _ = query.shape
    if key.shape[1] != H:
        key = key.repeat_interleave(H // key.shape[1], 1)

    def mix(values: Tensor) -> Tensor:
        fresh = values.view(B, S, -1)
        past = None if layer.memory is None else layer.memory.get("attention_values")
        both = fresh if past is None else torch.cat([past, fresh], 1)
        if layer.memory is not None:
            layer.memory["attention_values"] = both.detach()
        if both.shape[1] != key.shape[2]:
            raise ConfigError(
                f"attention of layer {layer.layer_index} looks at {key.shape[2]} tokens, the router knows "
                f"{both.shape[1]}; a cache that drops tokens cannot go with it"
            )
        spread = both[:, None].expand(B, H, *both.shape[1:]).to(query.dtype)
        causal = mask is None and S > 1
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query, key, spread, attn_mask=mask, is_causal=causal, scale=scaling
        )
        attention.noted = None
        return mixed.mean(1).reshape(B * S, -1).float()

    return mix
