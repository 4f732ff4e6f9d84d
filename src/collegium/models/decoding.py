"""What routers need of a decoder: positions, memory that goes with a key-value cache, and averages by a layer's
attention.

Legend: B sequences, S new tokens, L tokens that attention looks at, G key-value heads, n values of a token.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.layer import MoE
from collegium.routing import check_parts

__all__ = ["give_memory", "give_mixing", "give_positions", "refuse_decoding"]

NAME = "collegium_mixing"
"""Of the attention implementation that lets routers average by it, before the name of what it wraps."""

_ABLE = ("sdpa", "eager")


# ---- positions and memory --------------------------------------------------------------------------------------------


def give_positions(model: PreTrainedModel, layers: list[MoE]) -> None:
    """Tell every layer at inference where in their sequences the tokens of a forward stand: what the decoder is told,
    or from the end of the key-value cache on."""
    positions = _Positions(layers)
    model.get_decoder().register_forward_pre_hook(positions.begin, with_kwargs=True)
    model.get_decoder().register_forward_hook(positions.end, always_call=True)


def give_memory(model: PreTrainedModel, layers: list[MoE]) -> None:
    """Let every layer's routers keep what they want of a sequence for as long as its key-value cache lives."""
    memory = _Memory(layers)
    model.get_decoder().register_forward_pre_hook(memory.begin, with_kwargs=True)
    model.get_decoder().register_forward_hook(memory.end, with_kwargs=True)


class _Positions:
    """Hooks of `give_positions`: methods, so that those of a model's deep copy are about the copy's layers."""

    def __init__(self, layers: list[MoE]) -> None:
        self.layers = layers

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        said = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens = next(one for one in said if one is not None)
        position = kwargs.get("position_ids")
        if position is None:
            past = _past(kwargs)
            position = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        elif position.dim() == 3:  # of several axes, where images have a height and a width
            position = position[0]
        for layer in self.layers:
            layer.position = None if module.training else position.expand(tokens.shape[:2]).reshape(-1)

    def end(self, *call: Any) -> None:
        for layer in self.layers:
            layer.position = None


class _Memory:
    """Hooks of `give_memory`; methods, as those of `_Positions`."""

    def __init__(self, layers: list[MoE]) -> None:
        self.layers = layers
        # cache -> how many of its tokens these layers have seen; what they keep of them is the cache's
        self.seen: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self.now: list[dict[str, Tensor]] = []

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        past, seen, self.now = _past(kwargs), 0, [{} for _ in self.layers]
        if past and (seen := self.seen.get(kwargs["past_key_values"], 0)):
            self.now = kwargs["past_key_values"].router_memories
        if past != seen:
            raise ConfigError(
                f"the cache holds {past} tokens, of which these routers have seen {seen}; begin with an empty one"
            )
        for layer, memory in zip(self.layers, self.now, strict=True):
            layer.memory = None if module.training else memory

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            if not isinstance(cache, _Followed):
                kind: Any = type(cache)
                cache.__class__ = _followed(kind)
            cache.router_memories = self.now
            self.seen[cache] = int(cache.get_seq_length())


class _Followed:
    """Before a cache's own class: what routers keep of its sequences moves with them, as in beam search."""

    router_memories: list[dict[str, Tensor]]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._move(lambda one: one.index_select(0, beam_idx.to(one.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._move(lambda one: one[indices.to(one.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._move(lambda one: one.repeat_interleave(repeats, 0))

    def _move(self, change: Callable[[Tensor], Tensor]) -> None:
        for memory in self.router_memories:
            memory.update({name: change(kept) for name, kept in memory.items()})


@functools.cache
def _followed(kind: Any) -> Any:
    return type(kind.__name__, (_Followed, kind), {"__module__": kind.__module__})


def _past(kwargs: dict[str, Any]) -> int:
    """Tokens that the key-value cache holds which a decoder is called with."""
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def refuse_decoding(model: PreTrainedModel, layers: list[MoE]) -> None:
    """Let the model refuse to go on from a key-value cache where a router needs the tokens that are not there yet.
    Whole sequences can still be evaluated."""

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _past(kwargs):
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
    for layer, attention in pairs:
        _check_attention(layer, attention)
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
        layer.mixing = partial(_mix, layer, attention)


def _check_attention(layer: MoE, attention: nn.Module) -> None:
    """Refuse a module whose forward does not look its attention up by the name of its implementation (as linear
    attention does not), or does something else under one name than under another."""
    forward: Any = inspect.unwrap(type(attention).forward)
    names = [one for const in forward.__code__.co_consts for one in (const if isinstance(const, tuple) else (const,))]
    why = None
    if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
        why = "does not attend through transformers' attention interface"
    elif any(own in names for own in _ABLE):
        why = f"masks tokens itself where the implementation is named {' or '.join(_ABLE)}, which would be lost"
    if why:
        raise UnsupportedFamilyError(
            f"the {type(attention).__name__} of layer {layer.layer_index} {why}, so the router beside it cannot "
            "average by it"
        )


def _noting(own: str) -> Callable[..., Any]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        """The model's own attention; the call is kept until the router has asked."""
        if own == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = AttentionInterface()[own]
        if getattr(module, "notes_for_routers", False):
            again = kwargs | {"attention_mask": attention_mask, "dropout": 0.0}
            noted: Any = (partial(function, module, query, key, **again), key, kwargs.get("sliding_window"))
            module.noted = noted
        return function(module, query, key, value, attention_mask, **kwargs)

    return attend


def _mix(layer: MoE, attention: Any, values: Tensor) -> Tensor:
    """``values [T, n] -> [T, n]``, averaged as the attention that has just run did, over all of its heads: the same
    call with other values, so that masks, windows, caps and sinks are its own. What goes to a sink is lost.

    Raises:
        ConfigError: attention looks at other tokens than the router has seen.
    """
    (call, key, window), attention.noted = attention.noted, None
    B, G, L, _ = key.shape
    fresh = values.view(B, -1, values.shape[-1])
    past = None if layer.memory is None else layer.memory.get("attention_values")
    both = fresh if past is None else torch.cat([past, fresh], 1)
    if window is not None:  # of the past such a cache keeps the latest tokens
        both = both[:, -L:]
    if layer.memory is not None:
        layer.memory["attention_values"] = both.detach()
    if both.shape[1] != L:
        raise ConfigError(
            f"attention of layer {layer.layer_index} looks at {L} tokens, the router knows {both.shape[1]}; a cache "
            "that drops tokens, or holds places for more, cannot go with it"
        )
    mixed = call(value=both[:, None].expand(B, G, -1, -1).to(key.dtype))[0]
    return mixed.mean(2).reshape(len(values), -1).float()
