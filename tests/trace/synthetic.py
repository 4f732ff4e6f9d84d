"""A made-up run, written through the writer: known routing without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from collegium.trace import LayerMeta, LayerRows, TraceMeta, TraceWriter
from collegium.trace.schema import column_names

E, K = (8, 300), (2, 3)  # two layers: uint8 ids, and uint16 ids


def make_meta(*, logits: bool = False, gate_inputs: bool = False, **changes: Any) -> TraceMeta:
    layers = [
        LayerMeta(layer=1 + 2 * i, path=f"model.layers.{1 + 2 * i}.mlp", num_experts=E[i], top_k=K[i], score="softmax")
        for i in range(2)
    ]
    settings: dict[str, Any] = {
        "model": "synthetic",
        "family": "none",
        "layers": tuple(layers),
        "data": "numbers",
        "domains": ("code", "prose"),
        "columns": column_names([1, 3], logits=logits, gate_inputs=gate_inputs),
        "created": "2026-11-22T00:00:00+00:00",
        "collegium": "0",
    }
    return TraceMeta(**settings | changes)


def make_rows(N: int, seed: int = 0, ragged: bool = False) -> tuple[dict[str, np.ndarray], list[LayerRows]]:
    """N tokens of sequences of 16; even sequences are code. With `ragged` tokens have 0 to K experts."""
    random = np.random.default_rng(seed)
    place = np.arange(N)
    tokens = {
        "sequence": place // 16,
        "document": place // 8,
        "position": place % 16,
        "token": random.integers(0, 50_000, N),
        "domain": (place // 16) % 2,
    }
    layers = []
    for experts, slots in zip(E, K, strict=True):
        dense = np.stack([random.permutation(experts)[:slots] for _ in range(N)]) if N else np.empty((0, slots), int)
        lengths = random.integers(0, slots + 1, N) if ragged else np.full(N, slots)
        keep = np.arange(slots) < lengths[:, None]
        weight = random.random((N, slots)).astype(np.float16)
        layers.append(LayerRows(dense[keep], weight[keep], lengths if ragged else None))
    return tokens, layers


def write(folder: Path, N: int = 100, *, batch: int = 16, part_rows: int = 32, ragged: bool = False) -> TraceMeta:
    """A complete trace of N tokens, added in batches."""
    meta = make_meta()
    with TraceWriter(folder, meta, part_rows=part_rows) as writer:
        for step, start in enumerate(range(0, N, batch)):
            writer.add(*make_rows(min(batch, N - start), seed=step, ragged=ragged), step=step)
    return meta
