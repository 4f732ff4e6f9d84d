"""The two files of the `run` benchmark: an expert store for us and a GGUF for llama.cpp, with the same numbers in both.

Experts have the same codes and scales on both sides: our 8 bits are Q8_0 with one scale for all blocks of a row, our 4
bits in groups of 32 are Q4_0. Everything else is bfloat16 on both sides, except that llama.cpp wants norms and routers
in float32.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import defaultdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.numpy import save
from safetensors.torch import save_file
from transformers import OlmoeConfig

from collegium import __version__
from collegium.benchmarks._run_model import Array, Shape, expert, float32, tensor, tensors
from collegium.experts.stored import quantise
from collegium.offload.store.meta import CHECKSUMS, META, LayerMeta, StoreMeta, experts_file, write_meta
from collegium.offload.store.source import aligned

__all__ = ["make"]

_PER_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def make(shape: Shape, table: Array, store: Path, gguf_file: Path) -> None:
    """Write both, one layer of experts in memory at a time; nothing of them stays in the page cache.

    Args:
        table: ``[V, L, K]``, the experts of each token id, the heaviest first.
    """
    store.mkdir()
    config = OlmoeConfig(**shape.config(), architectures=["OlmoeForCausalLM"], dtype="bfloat16")
    config.save_pretrained(store)
    peer = _Gguf(shape, gguf_file)
    shards, sums = _rest(shape, table, store, peer), {}
    for layer in range(shape.layers):
        experts = [expert(shape, layer, number) for number in range(shape.E)]
        sums[f"{layer}.{shape.bits}"] = _records(shape, experts, store / experts_file(layer, shape.bits))
        peer.experts(layer, experts)
    peer.close()
    (store / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (store / CHECKSUMS).write_bytes(content := save(sums))
    write_meta(store / META, _meta(shape, f"{zlib.crc32(content):08x}"))


def _meta(shape: Shape, checksums: str) -> StoreMeta:
    sizes = {"num_experts": shape.E, "top_k": shape.K, "d": shape.d, "f": shape.f}
    layers = [
        LayerMeta(layer=n, path=f"model.layers.{n}.mlp", gated=True, interleaved=False, bias=False, **sizes)
        for n in range(shape.layers)
    ]
    return StoreMeta(
        model="made up",
        fingerprint="0" * 32,
        family="olmoe",
        dtype="bfloat16",
        bits=(shape.bits,),  # type: ignore[arg-type]
        group=shape.layout.group,  # type: ignore[arg-type]
        layers=tuple(layers),
        left_out=0,
        checksums=checksums,
        collegium=__version__,
    )


def _records(shape: Shape, experts: list[dict[str, Array]], path: Path) -> Array:
    """Write the records of a layer; their checksums."""
    sums = np.zeros(shape.E, np.uint32)
    record = aligned(shape.layout.nbytes)
    record[:] = 0
    views = shape.layout.views(torch.from_numpy(record))
    with open(path, "wb") as file:
        for number, fields in enumerate(experts):
            for name, values in fields.items():
                views[name].copy_(torch.from_numpy(values))
            sums[number] = zlib.crc32(record.data)
            file.write(record.data)
        _settle(file)
    return sums


def _rest(shape: Shape, table: Array, store: Path, peer: _Gguf) -> dict[str, str]:
    """Write everything but the experts to both sides; which file of the store has which tensor."""
    shards: dict[str, list[str]] = defaultdict(list)
    for name, _ in tensors(shape):
        shards[f"model-{name.split('.')[2] if 'layers' in name else 'rest'}.safetensors"].append(name)
    for file, names in shards.items():
        held = {}
        for name in names:
            bits = tensor(shape, name, table)
            peer.add(name, bits)
            held[name] = torch.from_numpy(bits).view(torch.bfloat16)
        save_file(held, store / file, metadata={"format": "pt"})
        with open(store / file, "rb+") as handle:
            _settle(handle)
    return {name: file for file, names in shards.items() for name in names}


class _Gguf:
    """Writes the peer's file; tensors come in the order in which they are announced."""

    def __init__(self, shape: Shape, path: Path) -> None:
        import gguf  # an extra

        self.shape, self.types = shape, gguf.GGMLQuantizationType
        self.writer = writer = gguf.GGUFWriter(path, "olmoe")
        writer.add_block_count(shape.layers)
        writer.add_context_length(4096)
        writer.add_embedding_length(shape.d)
        writer.add_feed_forward_length(shape.f)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        writer.add_expert_count(shape.E)
        writer.add_expert_used_count(shape.K)
        writer.add_vocab_size(shape.vocabulary)
        writer.add_tokenizer_model("none")  # token ids go in, logits come out
        for name, size in tensors(shape):
            self._announce(name, size)
        quantised = self.types.Q8_0 if shape.bits == 8 else self.types.Q4_0
        for layer in range(shape.layers):
            for name, (p, q) in self._matrices().items():
                block, nbytes = gguf.GGML_QUANT_SIZES[quantised]
                size = (shape.E, p, q // block * nbytes)
                writer.add_tensor_info(
                    f"blk.{layer}.{name}.weight", size, np.dtype(np.uint8), int(np.prod(size)), quantised
                )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()

    def _matrices(self) -> dict[str, tuple[int, int]]:
        d, f = self.shape.d, self.shape.f
        return {"ffn_gate_exps": (f, d), "ffn_up_exps": (f, d), "ffn_down_exps": (d, f)}

    def _announce(self, name: str, size: tuple[int, ...]) -> None:
        if _wide(name):
            nbytes = int(np.prod(size)) * 4
            self.writer.add_tensor_info(_peer_name(name), size, np.dtype(np.float32), nbytes, self.types.F32)
        else:
            rows = (size[0], size[1] // 32 * 34)
            self.writer.add_tensor_info(_peer_name(name), rows, np.dtype(np.uint8), int(np.prod(rows)), self.types.Q8_0)

    def add(self, name: str, bits: Array) -> None:
        """Write one of `tensors`."""
        if _wide(name):
            self.writer.write_tensor_data(float32(bits))
        else:  # the very codes and scales that `load_offloaded(dense_bits=8)` makes
            codes, scale = quantise(torch.from_numpy(bits).view(torch.bfloat16), 8)
            self.writer.write_tensor_data(_blocks(codes.numpy(), scale.numpy(), 8))

    def experts(self, layer: int, experts: list[dict[str, Array]]) -> None:
        """Write the experts of the next layer."""
        f = self.shape.f
        for field, rows in (("up", slice(0, f)), ("up", slice(f, None)), ("down", slice(None))):
            blocks = [_blocks(one[field][rows], one[f"{field}_scale"][rows], self.shape.bits) for one in experts]
            self.writer.write_tensor_data(np.stack(blocks))

    def close(self) -> None:
        """Finish the file."""
        assert self.writer.fout is not None
        for file in self.writer.fout:
            _settle(file)
        self.writer.close()


def _wide(name: str) -> bool:
    return "norm" in name or name.endswith("mlp.gate.weight")


def _peer_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{_PER_LAYER[inner]}.weight"


def _blocks(codes: Array, scale: Array, bits: int) -> Array:
    """Q8_0 or Q4_0 blocks of 32 weights, a float16 scale before its codes, as uint8 ``[p, bytes of a row]``."""
    p, width = len(codes), 32 if bits == 8 else 16
    packed = codes.view(np.uint8).reshape(p, -1, width)
    scales = np.broadcast_to(scale.reshape(p, -1, 1).astype(np.float16), (p, packed.shape[1], 1))
    return np.concatenate([np.ascontiguousarray(scales).view(np.uint8), packed], 2).reshape(p, -1)


def _settle(file: IO[Any]) -> None:
    """Wait until a file is on the disk, and take it out of the page cache."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
