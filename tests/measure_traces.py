"""Small traces for the tests of measure and report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from collegium.trace import LayerMeta, LayerRows, Trace, TraceMeta, TraceWriter
from collegium.trace.schema import column_names


def make_trace(
    folder: Path,
    experts: Mapping[int, Any],
    num_experts: int | Mapping[int, int],
    *,
    top_k: int | Mapping[int, int] | None = None,
    weights: Mapping[int, Any] | None = None,
    logits: Mapping[int, Any] | None = None,
    gate_inputs: Mapping[int, Any] | None = None,
    tokens: Sequence[int] | None = None,
    sequences: Sequence[int] | None = None,
    documents: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    domains: Sequence[int] | None = None,
    domain_names: Sequence[str] = ("unknown",),
    phases: Sequence[str] | None = None,
    score: str = "softmax",
    part_rows: int = 64,
    complete: bool = True,
) -> Trace:
    """A trace of layers ``{layer: experts [N, K]}``, where ids of at least E are unused slots.

    What is left out is: tokens 0..N-1, one sequence, documents as sequences, positions counted within sequences,
    domain 0, even weights, phase "prefill".
    """
    layers = sorted(experts)
    arrays = {layer: np.atleast_2d(np.asarray(experts[layer])) for layer in layers}
    N = len(arrays[layers[0]])
    size = {layer: num_experts if isinstance(num_experts, int) else num_experts[layer] for layer in layers}
    k = {
        layer: arrays[layer].shape[1] if top_k is None else top_k if isinstance(top_k, int) else top_k[layer]
        for layer in layers
    }
    sequence = np.zeros(N, np.int64) if sequences is None else np.asarray(sequences)
    columns = {
        "token": np.arange(N) if tokens is None else np.asarray(tokens),
        "sequence": sequence,
        "document": sequence if documents is None else np.asarray(documents),
        "position": _positions(sequence) if positions is None else np.asarray(positions),
        "domain": np.zeros(N, np.int64) if domains is None else np.asarray(domains),
    }
    meta = TraceMeta(
        model="test",
        family="test",
        layers=tuple(
            LayerMeta(layer=n, path=f"layers.{n}.mlp", num_experts=size[n], top_k=k[n], score=score) for n in layers
        ),
        data="made by a test",
        domains=tuple(domain_names),
        columns=column_names(layers, logits=logits is not None, gate_inputs=gate_inputs is not None),
        created="2026-01-01T00:00:00+00:00",
        collegium="0",
    )
    phase = np.asarray(phases if phases is not None else ["prefill"] * N)
    # one call a run of rows of one phase: a step of the writer has one phase
    cuts = [0, *(np.flatnonzero(phase[1:] != phase[:-1]) + 1).tolist(), N] if N else [0]
    try:
        with TraceWriter(folder, meta, part_rows=part_rows) as writer:
            for step, (first, last) in enumerate(itertools.pairwise(cuts)):
                rows = slice(first, last)
                writer.add(
                    {name: values[rows] for name, values in columns.items()},
                    [
                        _layer_rows(
                            arrays[n][rows],
                            size[n],
                            None if weights is None else np.asarray(weights[n])[rows],
                            None if logits is None else np.asarray(logits[n], np.float16)[rows],
                            None if gate_inputs is None else np.asarray(gate_inputs[n], np.float32)[rows],
                        )
                        for n in layers
                    ],
                    phase=str(phase[first]),
                    step=step,
                    sampled=None if gate_inputs is None else np.ones(last - first, bool),
                )
            if not complete:
                raise InterruptedError
    except InterruptedError:
        pass
    return Trace.open(folder)


def _positions(sequence: Any) -> Any:
    seen: dict[int, int] = {}
    found = []
    for number in sequence.tolist():
        found.append(seen.get(number, 0))
        seen[number] = found[-1] + 1
    return np.asarray(found, np.int64)


def _layer_rows(experts: Any, E: int, weights: Any, logits: Any, gate_input: Any) -> LayerRows:
    used = experts < E
    lengths = used.sum(1)
    value = np.full(experts.shape, 1 / max(experts.shape[1], 1)) if weights is None else weights
    return LayerRows(
        expert=experts[used],
        weight=value[used].astype(np.float16),
        lengths=lengths if len(set(lengths.tolist())) > 1 or not used.all() else None,
        logits=logits,
        gate_input=gate_input,
    )
