"""The made-up model of the `run` benchmark: OLMoE's architecture, whose routing follows a table.

The residual stream has two parts. In its first L * E coordinates nothing but the token embedding ever writes: attention
and experts have zeros there. Coordinate l * E + e of a token's embedding says whether expert e of layer l is to get it,
and the router of layer l reads those coordinates alone. Norms multiply them by one positive number, so the order stands
and both sides of a comparison route a token the same way, whatever text stands before it. The other coordinates are a
random model.

Legend: L layers, d model width, f expert width, E experts of a layer, K slots, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.errors import ConfigError
from collegium.experts.stored import ExpertLayout

__all__ = ["Array", "Shape", "expert", "float32", "tensor", "tensors"]

Array = np.ndarray[Any, Any]

_ROUTER = 4.0  # logit of a chosen expert over the others, where the residual stream has a mean square of 1
_EXPERT = 2.0  # what experts add to the residual stream, as a multiple of a plain random layer


@dataclass(frozen=True)
class Shape:
    """Sizes; the defaults are those of OLMoE-1B-7B.

    Attributes:
        bits: of an expert's weights, 8 or 4; other matrices are held in 8 bits.

    Raises:
        ConfigError: the routing table does not leave half of d to the model.
    """

    layers: int = 16
    d: int = 2048
    f: int = 1024
    E: int = 64
    K: int = 8
    heads: int = 16
    vocabulary: int = 50304
    bits: int = 8

    def __post_init__(self) -> None:
        if 2 * self.code > self.d:
            raise ConfigError(f"{self.layers} layers of {self.E} experts need {self.code} of {self.d} coordinates")

    @property
    def code(self) -> int:
        """Coordinates that hold the routing."""
        return self.layers * self.E

    @property
    def layout(self) -> ExpertLayout:
        """Of an expert's record in the store."""
        return ExpertLayout(self.d, self.f, bits=self.bits, group=32 if self.bits == 4 else 0)

    def config(self) -> dict[str, Any]:
        """Settings of `OlmoeConfig`."""
        return {
            "hidden_size": self.d,
            "intermediate_size": self.f,
            "num_experts": self.E,
            "num_experts_per_tok": self.K,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "vocab_size": self.vocabulary,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 0,
            "bos_token_id": None,
            "pad_token_id": None,
        }


def expert(shape: Shape, layer: int, number: int) -> dict[str, Array]:
    """The codes and scales of one expert, as the fields of its record are named and shaped."""
    random, found = np.random.default_rng([layer, number]), {}
    for name, (p, q) in shape.layout.matrices.items():
        gain = _EXPERT if name == "down" else 1.0
        if shape.bits == 8:
            found[name] = random.integers(-127, 128, (p, q), np.int8)
            scale = gain / (73 * q**0.5) * random.uniform(0.7, 1.3, p).astype(np.float32)
            found[f"{name}_scale"] = scale.astype(np.float16).astype(np.float32)
        else:
            found[name] = random.integers(0, 256, (p, q // 2), np.uint8)
            scale = gain / (4.6 * q**0.5) * random.uniform(0.7, 1.3, (p, q // 32)).astype(np.float32)
            found[f"{name}_scale"] = scale.astype(np.float16)
    found["down_scale"][: shape.code] = 0
    return found


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of everything but the experts, as transformers names them; layer -1 first."""
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.d)
    yield "model.norm.weight", (shape.d,)
    yield "lm_head.weight", (shape.vocabulary, shape.d)
    for layer in range(shape.layers):
        stem = f"model.layers.{layer}"
        for name in "qkvo":
            yield f"{stem}.self_attn.{name}_proj.weight", (shape.d, shape.d)
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
            yield f"{stem}.{name}.weight", (shape.d,)
        yield f"{stem}.mlp.gate.weight", (shape.E, shape.d)


def tensor(shape: Shape, name: str, table: Array) -> Array:
    """One of `tensors`, as the bits of bfloat16 numbers in uint16.

    Args:
        table: ``[V, L, K]``, the experts of each token id, the heaviest first.
    """
    random = np.random.default_rng(zlib.crc32(name.encode()))
    size = dict(tensors(shape))[name]
    if name.endswith("mlp.gate.weight"):
        first = int(name.split(".")[2]) * shape.E
        weight = np.zeros(size, np.float32)
        weight[np.arange(shape.E), first + np.arange(shape.E)] = _ROUTER
    elif len(size) == 1:
        weight = 1 + 0.1 * random.standard_normal(size, np.float32)
        if name.endswith("post_attention_layernorm.weight"):
            weight[: shape.code] = 1
    else:
        weight = random.standard_normal(size, np.float32)
        if "embed" in name:
            _write_codes(shape, weight, table)
        else:
            weight *= shape.d**-0.5
    if name.endswith("o_proj.weight"):
        weight[: shape.code] = 0
    return (weight.view(np.uint32) >> 16).astype(np.uint16)


def _write_codes(shape: Shape, embedding: Array, table: Array) -> None:
    """1 to 1.5 for the experts of a token, 0 for the others: exact in bfloat16, and no two of a layer alike."""
    embedding[:, : shape.code] = 0
    rows = np.arange(shape.vocabulary)[:, None]
    for layer in range(shape.layers):
        embedding[rows, layer * shape.E + table[:, layer]] = 1.5 - np.arange(shape.K, dtype=np.float32) / 16


def float32(bits: Array) -> Array:
    """The numbers that bfloat16 bits stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
