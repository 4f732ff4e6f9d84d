"""Runs the embeddings, one decoder layer, or what makes logits, the way the model's own forward does.

What a layer is called with (masks, rotary tables, positions) is what the model calls it with: each forward runs the
whole model, in which the other layers hand on what they get, and ends behind the part that is asked for.

Legend: B sequences, S positions of a batch, d model width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from collegium.errors import UnsupportedFamilyError
from collegium.layerwise import LayerwiseModel

__all__ = ["Forward", "Part", "check_layers", "no_gradients"]

_LAYER_INPUTS = frozenset({
    "hidden_states", "attention_mask", "position_ids", "position_embeddings", "past_key_values", "past_key_value",
    "use_cache", "cache_position", "output_attentions", "output_router_logits", "conv_mask", "attention_scaling",
})  # fmt: skip
"""What a decoder layer may take: all of it comes from the token ids, masks and positions. Anything else could come from
an earlier layer, which does not run again."""


@dataclass(frozen=True, eq=False)
class Part:
    """One batch: what the model is called with, the columns of its tokens, and B and S."""

    inputs: dict[str, Any]
    columns: dict[str, Tensor]
    shape: tuple[int, int]


class _Done(Exception):
    """Ends a forward behind the layer that was to run."""


class Forward:
    """The model, part by part. The part that is asked for must be loaded."""

    def __init__(self, streamed: LayerwiseModel) -> None:
        self.streamed = streamed
        self.width = streamed.model.config.get_text_config().hidden_size
        self.accepts = inspect.signature(streamed.model.forward).parameters
        self._number: int | None = None
        self._shape: tuple[int, ...] = ()
        self._hidden: Tensor | None = None
        self._passed: Tensor | None = None
        self._output: Any = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the context the model's layers do what this object says."""
        modules = [self.streamed.embedding, *self.streamed.layers]
        self.streamed.embedding.forward = partial(self._at_embedding, self.streamed.embedding.forward)
        for number, layer in enumerate(self.streamed.layers):
            layer.forward = partial(self._at_layer, number, layer.forward)
        try:
            yield
        finally:
            for module in modules:
                del module.forward  # the class has its own

    def embed(self, part: Part) -> Tensor:
        """``[B, S, d]`` what goes into layer 0."""
        return self._run(None, None, part)

    def layer(self, number: int, hidden: Tensor, part: Part) -> Tensor:
        """``[B, S, d]`` what comes out of a layer for ``hidden [B, S, d]``."""
        return self._run(number, hidden, part)

    def logits(self, hidden: Tensor, part: Part, positions: Tensor) -> Tensor:
        """``[B, P, V]`` logits at ``positions [P]`` for ``hidden [B, S, d]`` out of the last layer."""
        self._number, self._hidden = len(self.streamed.layers), hidden
        # a Mixtral that is told to give router logits would look for those of layers that did not run
        wanted = {"logits_to_keep": positions, "output_router_logits": False}
        inputs = part.inputs | {name: value for name, value in wanted.items() if name in self.accepts}
        logits: Tensor = self.streamed.model(**inputs).logits
        self._hidden = self._passed = None
        if logits.is_meta or logits.shape[:2] != (part.shape[0], len(positions)):
            raise no_gradients(
                self.streamed, f"its logits at {len(positions)} positions are {tuple(logits.shape)} on {logits.device}"
            )
        return logits

    def _run(self, number: int | None, hidden: Tensor | None, part: Part) -> Tensor:
        self._number, self._hidden, self._shape = number, hidden, (*part.shape, self.width)
        with suppress(_Done):
            self.streamed.model(**part.inputs)
        output, self._output, self._hidden, self._passed = self._output, None, None, None
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if shape != self._shape or output.dtype != self.streamed.dtype:
            where = "the embeddings" if number is None else f"layer {number}"
            raise self._refusal(
                f"what comes out of {where} is {getattr(output, 'dtype', None)} {shape}, not "
                f"{self.streamed.dtype} {self._shape}"
            )
        return output

    def _at_embedding(self, forward: Callable[..., Tensor], ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._number is None:
            return forward(ids, *args, **kwargs)
        # what the first layer gets is not used
        return torch.zeros(*ids.shape, self.streamed.embedding.weight.shape[1], dtype=self.streamed.dtype)

    def _at_layer(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if self._number is None:
            self._output = hidden
            raise _Done
        if number == 0:
            self._passed = hidden
        elif hidden is not self._passed:
            raise self._refusal(f"something happens to the hidden states between layers {number - 1} and {number}")
        if number < self._number:
            return self._hidden if number == len(self.streamed.layers) - 1 else hidden
        other = [key for key, value in kwargs.items() if key not in _LAYER_INPUTS and not _plain(value)]
        if other:
            raise self._refusal(f"its decoder layers are also given {', '.join(other)}")
        self._output = forward(self._hidden, *args[1:], **kwargs)
        raise _Done

    def _refusal(self, why: str) -> UnsupportedFamilyError:
        return _refusal(self.streamed, why)


def _refusal(streamed: LayerwiseModel, why: str) -> UnsupportedFamilyError:
    """Says that a family cannot be streamed."""
    return UnsupportedFamilyError(
        f"family {streamed.family!r} cannot be streamed layer by layer: {why}; load the whole model and use "
        "collegium.measure.collect"
    )


def no_gradients(streamed: LayerwiseModel, why: str) -> UnsupportedFamilyError:
    """Says that gradients of a family cannot be streamed."""
    return UnsupportedFamilyError(
        f"gradients of family {streamed.family!r} cannot be taken layer by layer: {why}; leave out the collectors that "
        "need them"
    )


def _plain(value: Any) -> bool:
    """Whether it is a setting, not something computed."""
    return value is None or isinstance(value, bool | int | float | str)


def check_layers(streamed: LayerwiseModel) -> None:
    """Refuse decoder layers that take more than a layer can be given on its own. Raises UnsupportedFamilyError."""
    for layer in streamed.layers:
        taken = inspect.signature(layer.forward).parameters
        named = {name for name, one in taken.items() if one.kind is not inspect.Parameter.VAR_KEYWORD}
        if named - _LAYER_INPUTS:
            raise _refusal(streamed, f"its decoder layers also take {', '.join(sorted(named - _LAYER_INPUTS))}")
