"""Which experts each token id of the `run` benchmark gets: at random, and as a real router chose them.

The real routers are those of the shipped demo model (4 layers, 16 experts, 2 a token) while it reads source texts of
this Python's library. An expert of it stands for a block of E / 16 experts of the shape, so that K / 2 = E / 16 experts
come and go together and a layer's locality is that of the demo model; every four layers replay another text.
"""

from __future__ import annotations

import inspect
import tempfile
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from collegium.assets import SHIPPED
from collegium.benchmarks._run_model import Array, Shape
from collegium.data import encode_texts
from collegium.errors import ConfigError
from collegium.trace import Trace, record

__all__ = ["TEXTS", "demo_trace", "replayed", "routing_table"]

TEXTS = ("argparse", "statistics", "tarfile", "difflib")
"""Modules whose sources are read, one for each four layers."""
_WINDOW = 256  # tokens the demo model was trained to see at once


def demo_trace(text: str, tokens: int, out: Path, *, logits: bool = False) -> Trace:
    """Record where the demo model sends the first tokens of a module's source, in order."""
    ids = encode_texts(AutoTokenizer.from_pretrained(SHIPPED["demo"]), [inspect.getsource(import_module(text))])[0]
    if len(ids) < tokens:
        raise ConfigError(f"the source of {text} has {len(ids)} tokens, fewer than {tokens}")
    model = AutoModelForCausalLM.from_pretrained(SHIPPED["demo"], dtype=torch.float32)
    windows = [torch.tensor([ids[first : min(first + _WINDOW, tokens)]]) for first in range(0, tokens, _WINDOW)]
    return record(model, [{"input_ids": window} for window in windows], out, data=text, logits=logits)


def replayed(shape: Shape, tokens: int) -> Array:
    """``[tokens, L, K]``: the experts of each token of a text, the heaviest first.

    Raises:
        ConfigError: the shape has no blocks of experts of the demo model's proportions.
    """
    found = np.empty((tokens, shape.layers, shape.K), np.int64)
    with tempfile.TemporaryDirectory() as scratch:
        for layer in range(0, shape.layers, 4):
            text = TEXTS[layer // 4 % len(TEXTS)]
            trace = demo_trace(text, tokens, Path(scratch) / str(layer))
            for below, number in enumerate(trace.layers[: shape.layers - layer]):
                found[:, layer + below] = _blocks(shape, trace.experts(number))
    return found


def _blocks(shape: Shape, experts: Array) -> Array:
    """Replace each expert ``[N, 2]`` of 16 by its block."""
    block = shape.E // 16
    if block * 16 != shape.E or block * experts.shape[1] != shape.K:
        raise ConfigError(f"16 experts, 2 a token, cannot stand for {shape.E} experts, {shape.K} a token")
    wide = experts[:, :, None].astype(np.int64) * block + np.arange(block)
    return wide.reshape(len(experts), -1)


def routing_table(shape: Shape, tokens: int) -> Array:
    """``[V, L, K]``: the first token ids are a text in its order, all others get experts at random."""
    random = np.random.default_rng(0)
    table = np.empty((shape.vocabulary, shape.layers, shape.K), np.int64)
    for layer in range(shape.layers):
        draws = random.random((shape.vocabulary, shape.E), np.float32)
        table[:, layer] = draws.argpartition(shape.K, axis=1)[:, : shape.K]
    table[:tokens] = replayed(shape, tokens)
    return table
