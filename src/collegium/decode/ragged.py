"""One forward for the next tokens of many sequences of different lengths.

Legend: n sequences, H heads, G key-value heads, S_i tokens of sequence i, d head width, V vocabulary.

The n tokens go through the model as one row ``[1, n]``: all that works token by token (projections, norms, experts)
sees n tokens at once. Attention alone has to know whose token is whose. The cache appends each token to its own
sequence, and an attention function registered under a name of our own runs the model's own attention once per
sequence, without padding. Iteration-level batching is that of Orca (Yu et al., 2022).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from collegium.decode.kv import kv_cache
from collegium.layer import moe_layers
from collegium.models.attention import NAME as LEAN

__all__ = ["RaggedCache", "RaggedStep", "unbatched_reason"]

NAME = "collegium_ragged"


class RaggedCache(Cache):
    """The caches of n sequences, each of which gets one token of a row of n.

    Attributes:
        parts: of the layer that was updated last, keys and values ``[1, G, S_i, d]`` of each sequence.
    """

    def __init__(self, caches: Sequence[DynamicCache], direct: set[int]) -> None:
        super().__init__(layers=caches[0].layers)
        self.caches = caches
        self.parts: list[tuple[Tensor, Tensor]] = []
        self._direct = direct
        self._returned: tuple[int, Tensor, Tensor] | None = None
        self._appended: list[Any] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append token i of ``[1, G, n, d]`` to sequence i; all keys and values, one sequence behind the other.

        Where a layer is known to hand on what it gets here unchanged, the copy is saved: it gets its own tensors back,
        and attention takes `parts`. Layers that first expand what is stored (latent attention) need the copy.
        """
        self.parts = []
        for i, cache in enumerate(self.caches):
            layer = cache.layers[layer_idx]
            self.parts.append(layer.update(key_states[:, :, i : i + 1], value_states[:, :, i : i + 1]))
            self._appended.append(layer)
        if layer_idx in self._direct:
            keys, values = key_states, value_states
        else:
            keys, values = (torch.cat(side, dim=-2) for side in zip(*self.parts, strict=True))
        self._returned = layer_idx, keys, values
        return keys, values

    def split(self, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What attention was given, by sequence."""
        if self._returned is None:
            raise RuntimeError("attention ran before its layer had updated the cache")
        layer, keys, values = self._returned
        if key is keys and value is values:
            self._direct.add(layer)
            return self.parts
        lengths = [keys.shape[-2] for keys, _ in self.parts]
        if key.shape[-2] != sum(lengths):
            raise RuntimeError(f"attention of layer {layer} got {key.shape[-2]} keys, the cache holds {sum(lengths)}")
        return list(zip(key.split(lengths, -2), value.split(lengths, -2), strict=True))

    def take_back(self) -> None:
        """Undo all updates, after a forward that failed."""
        for layer in self._appended:
            layer.crop(-1)
        self._appended = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest sequence."""
        return max(cache.get_seq_length(layer_idx) for cache in self.caches)


class RaggedStep:
    """Runs one token of each of n sequences through `model`.

    Raises:
        ValueError: the model is one that `unbatched_reason` has a reason for.
    """

    def __init__(self, model: Any) -> None:
        if reason := unbatched_reason(model):
            raise ValueError(f"one request at a time: {reason}")
        self.model = model
        self._implementation = model.config._attn_implementation
        configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
        self._configs = [config for config in configs.values() if hasattr(config, "_attn_implementation")]
        self._direct: set[int] = set()
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _no_mask)

    def __call__(self, tokens: Sequence[int], caches: Sequence[DynamicCache]) -> Tensor:
        """Logits ``[n, V]`` after the next token of each sequence.

        Whatever the model raises is raised, with every cache as it was.
        """
        device = self.model.device
        positions = [[cache.get_seq_length() for cache in caches]]
        cache = RaggedCache(caches, self._direct)
        try:
            with self._attending(cache):
                output = self.model(
                    input_ids=torch.tensor([list(tokens)], device=device),
                    position_ids=torch.tensor(positions, device=device),
                    past_key_values=cache,
                    use_cache=True,
                )
        except BaseException:
            cache.take_back()
            raise
        logits: Tensor = output.logits[0]
        return logits

    @contextmanager
    def _attending(self, cache: RaggedCache) -> Iterator[None]:
        """Attention of the model goes through `_attention`."""
        token = _CURRENT.set((cache, self._implementation))
        try:
            for config in self._configs:
                # past the setter, which would also write to the configs of parts
                config._attn_implementation_internal = NAME
            yield
        finally:
            for config in self._configs:
                config._attn_implementation_internal = self._implementation
            _CURRENT.reset(token)


_CURRENT: ContextVar[tuple[RaggedCache, str]] = ContextVar("ragged")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The model's own attention, once per sequence: query ``[1, H, n, d]``, output ``[1, n, H, d]``.

    No mask is needed: one new token sees all that its cache returns.
    """
    cache, implementation = _CURRENT.get()
    attend = _own_attention(module, implementation)
    outputs = [
        attend(module, query[:, :, i : i + 1], keys, values, None, **kwargs)[0]
        for i, (keys, values) in enumerate(cache.split(key, value))
    ]
    return torch.cat(outputs, dim=1), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _own_attention(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The function of an attention implementation; "eager" is each modelling file's own."""
    if implementation == "eager":
        found: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    else:
        found = AttentionInterface()[implementation]
    return found


def unbatched_reason(model: Any) -> str | None:
    """Why the sequences of a model cannot share a forward, or None if they can. Read from its structure."""
    config = model.config
    parameters = inspect.signature(model.forward).parameters
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not attend through transformers' attention interface"
    if config.get_text_config(decoder=True) is not config:
        return f"{type(model).__name__} is a language model inside another model"
    if "position_ids" not in parameters or "past_key_values" not in parameters:
        return f"{type(model).__name__} does not take positions and a cache"
    if getattr(model, "_is_stateful", False) or kv_cache(config) is None:
        return f"{type(model).__name__} keeps more than keys and values (a recurrent, compressed or shared state)"
    if any(part.remembers for layer in moe_layers(model) for part in layer.gate.parts):
        return f"routers of this {type(model).__name__} keep what they saw of a sequence"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return f"{type(model).__name__} attends in chunks, which needs a mask even for one token"
    # the scaling follows the longest sequence of a forward, so neighbours in a batch would change it
    if found := _rope_types(getattr(config, "rope_parameters", None)) & {"dynamic", "longrope"}:
        return f"{type(model).__name__} scales positions by the length of the batch (rope type {', '.join(found)})"
    if (name := config._attn_implementation) not in ("eager", "sdpa", LEAN):
        return f"attention implementation {name!r} is neither eager nor sdpa"
    return None


def _rope_types(parameters: Any) -> set[str]:
    """Every rope type in a config's rope parameters, which may be nested by layer type."""
    if not isinstance(parameters, dict):
        return set()
    nested = (_rope_types(value) for value in parameters.values())
    own = {parameters["rope_type"]} if isinstance(parameters.get("rope_type"), str) else set()
    return own.union(*nested)
