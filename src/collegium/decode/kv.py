"""The key-value cache of one request: grows by blocks, and can take its last append back.

Legend: H key-value heads, S tokens, n new tokens, d head width.

transformers' own layer copies all it holds for every token. This one writes into blocks allocated ahead, so a token
costs what it adds, and a step that failed is undone by moving an end.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["BLOCK", "KVLayer", "kv_cache"]

BLOCK = 256
"""Tokens by which a layer grows: at most so many are allocated and not used."""


class KVLayer(DynamicLayer):
    """Keys and values of one layer of one sequence, ``[1, H, S, d]``; of a sliding window only what it can see."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.is_sliding = window is not None
        self.window = window
        self._seen = self._end = self._last = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[1, H, n, d]``; the keys and values that the new tokens may see, as views."""
        n, held = key_states.shape[-2], self._held()
        buffers = self._room(key_states, value_states, held, n)
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            buffer[..., self._end : self._end + n, :] = states
        self._end, self._seen, self._last = self._end + n, self._seen + n, n
        self.is_initialized = True
        self.keys, self.values = (buffer[..., self._end - n - held : self._end, :] for buffer in buffers)
        return self.keys, self.values

    def _held(self) -> int:
        """Tokens of the past that the next token may see."""
        return self._seen if self.window is None else min(self._seen, self.window - 1)

    def _room(self, keys: Tensor, values: Tensor, held: int, n: int) -> tuple[Tensor, Tensor]:
        """Buffers with room for n more tokens behind the `held` last ones."""
        if self._buffers is not None and self._end + n <= self._buffers[0].shape[-2]:
            return self._buffers
        capacity = -(-(held + n + (BLOCK if self.is_sliding else 0)) // BLOCK) * BLOCK
        old = self._buffers or (keys[..., :0, :], values[..., :0, :])
        fresh = []
        for states, buffer in zip((keys, values), old, strict=True):
            grown = states.new_empty(*states.shape[:-2], capacity, states.shape[-1])
            grown[..., :held, :] = buffer[..., self._end - held : self._end, :]
            fresh.append(grown)
        self._end = held
        self._buffers = (fresh[0], fresh[1])
        return self._buffers

    def crop(self, tokens_to_remove: int) -> None:
        """Take back up to as many tokens as the last update appended, given as a negative number.

        Raises:
            ValueError: more, or a positive number; what a window has dropped cannot come back.
        """
        count = -tokens_to_remove
        if not 0 <= count <= self._last:
            raise ValueError(f"cannot take back {count} tokens; the last update appended {self._last}")
        self._end, self._seen, self._last = self._end - count, self._seen - count, self._last - count
        if self._buffers is not None:
            self.keys, self.values = (buffer[..., self._end - self._held() : self._end, :] for buffer in self._buffers)

    def get_seq_length(self) -> int:
        """Tokens seen, also those that a window has dropped."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """``(keys, position of the first key)`` of an attention mask for so many new tokens."""
        return self._held() + query_length, self._seen - self._held()

    def get_max_length(self) -> int:
        """The window, or -1."""
        return -1 if self.window is None else self.window


def kv_cache(config: Any) -> DynamicCache | None:
    """An empty cache for a model of this config; None where a layer keeps anything but plain keys and values."""
    cache = DynamicCache(config=config)
    layers = []
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:
            layers.append(KVLayer(layer.sliding_window))
        elif type(layer) is DynamicLayer:
            layers.append(KVLayer())
        else:
            return None
    cache.layers = layers
    return cache
