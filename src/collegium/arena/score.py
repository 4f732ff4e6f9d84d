"""The numbers of one finished run.

Legend: N probe tokens, L MoE layers, E experts of a layer that compute something.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from collegium import models
from collegium.data import document_batches, open_corpus
from collegium.errors import CheckpointError
from collegium.files import atomic_file
from collegium.layer import moe_layers
from collegium.measure import domain_information, routing_fluctuation
from collegium.measure.tokens import read_tokens
from collegium.trace import Trace, record
from collegium.train import Recipe, count_parameters
from collegium.train.state import checkpoints

__all__ = ["SCORE", "score_run"]

SCORE = "score.json"
_BATCH = 32
_COUNTED = 4
"""Batches, from all over the probe, whose operations are counted."""


@dataclass(frozen=True)
class _Probe:
    batches: list[dict[str, Tensor]]
    domains: tuple[str, ...]


_probes: dict[str, _Probe] = {}
"""What was cut from a corpus for an earlier run: as a rule all runs of an arena share it."""


def score_run(folder: Path, recipe: Recipe, probe: int) -> dict[str, Any]:
    """Measure the run in `folder` and write ``score.json``; then its checkpoints are not needed any more.

    Returns:
        ``numbers`` (see `collegium.arena.results.LABELS`), ``domains`` (bits per byte of each) and ``causal``.

    Raises:
        CheckpointError: there is no finished run, or the checkpoint after two thirds of it is missing.
        CollegiumError: the model cannot be loaded or traced.
    """
    summary = _summary(folder)
    text = _probe(folder / "model", recipe, probe)
    earlier = _earlier(folder, recipe)
    before = _trace(earlier / "model", text, folder / "trace-earlier")
    after = _trace(folder / "model", text, folder / "trace")
    model = models.load(folder / "model", dtype=torch.float32).eval()
    found = {
        "recipe": recipe.plain(),
        "probe": probe,
        "causal": all(part.causal or part.remembers for layer in moe_layers(model) for part in layer.gate.parts),
        "domains": summary["domains"],
        "numbers": {
            "bits_per_byte": float(np.mean(list(summary["domains"].values()))),
            **_routing(model, after),
            "specialisation": float(np.mean([float(at.bits) - at.control for at in domain_information(after)])),
            **_fluctuation(before, after),
            "flops_per_token": _flops_per_token(model, text),
            "parameters": count_parameters(model).total,
            "peak_memory": summary["peak_memory_bytes"],
        },
    }
    with atomic_file(folder / SCORE) as partial:
        partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for left in (folder / "trace-earlier", folder / "checkpoints"):
        shutil.rmtree(left)
    return found


def _summary(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no finished run: {error}") from error
    return found


def _earlier(folder: Path, recipe: Recipe) -> Path:
    wanted = 2 * recipe.run.checkpoint_every
    for progress, path in checkpoints(folder / "checkpoints"):
        if progress.step == wanted:
            return path
    raise CheckpointError(f"{folder}/checkpoints has no complete one of step {wanted}; remove the run to train it anew")


def _probe(model: Path, recipe: Recipe, tokens: int) -> _Probe:
    """Held-out text, cut by the run's tokenizer."""
    data = recipe.data
    tokenizer = hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest()
    key = json.dumps([data.corpus, data.options, data.sequence_length, tokenizer, tokens])
    if key not in _probes:
        corpus = open_corpus(data.corpus, **data.options)
        batches = document_batches(
            corpus,
            AutoTokenizer.from_pretrained(model, local_files_only=True),
            "valid",
            sequence_length=data.sequence_length,
            batch_size=_BATCH,
            max_tokens=tokens,
        )
        _probes[key] = _Probe(list(batches), tuple(corpus.domains))
    return _probes[key]


def _trace(model: Path, probe: _Probe, out: Path) -> Trace:
    loaded = models.load(model, dtype=torch.float32)
    return record(loaded, probe.batches, out, domains=probe.domains, data="held-out text of the run", overwrite=True)


def _routing(model: Any, trace: Trace) -> dict[str, float]:
    """Means over layers, of experts that compute something: those without a computation cost nothing to overload."""
    tokens = read_tokens(trace)
    violations, dead, active, spread = [], [], [], []
    for layer in moe_layers(model):
        E = layer.gate.num_true or layer.gate.num_experts
        experts = tokens.experts(trace, layer.layer_index)
        counts = np.bincount(experts[experts < E].ravel(), minlength=E)
        each = (experts < E).sum(1)
        violations.append(counts.max() / max(counts.mean(), 1e-9) - 1)
        dead.append((counts == 0).mean())
        active.append(each.mean())
        spread.append(each.std())
    names = ("max_violation", "dead_experts", "active_experts", "active_spread")
    return {name: float(np.mean(of)) for name, of in zip(names, (violations, dead, active, spread), strict=True)}


def _fluctuation(before: Trace, after: Trace) -> dict[str, float]:
    """Nothing where layers route several times: a token's experts are then no set."""
    if any(layer.iterations > 1 for layer in after.meta.layers):
        return {}
    return {"fluctuation": float(np.mean([float(at.changed) for at in routing_fluctuation(before, after)]))}


@torch.no_grad()
def _flops_per_token(model: Any, probe: _Probe) -> float:
    """Floating-point operations of matrix products, attention's among them, in a forward pass, per token; as torch
    counts them where the experts run through its own products."""
    for layer in moe_layers(model):
        layer.experts.compute = "reference"
    total = tokens = 0
    for batch in probe.batches[:: max(len(probe.batches) // _COUNTED, 1)]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**inputs, use_cache=False)
        total += counter.get_total_flops()
        tokens += inputs["input_ids"].numel()
    return total / tokens
