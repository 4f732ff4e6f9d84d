"""What was traced, and how: the facts at the head of the page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from collegium.models.summary import Summary
from collegium.trace import Trace
from collegium.trace.schema import PHASES

__all__ = ["domain_tokens", "expert_bytes", "facts", "layers_in_words"]


def facts(trace: Trace, summary: Summary | None = None) -> list[tuple[str, str]]:
    """``(name, value)`` rows about the model and the trace."""
    meta = trace.meta
    phases = np.bincount(trace.column("phase"), minlength=len(PHASES))
    sequences, documents = (len(np.unique(trace.column(name))) for name in ("sequence", "document"))
    found = [
        ("model", meta.model),
        ("family", meta.family),
        ("MoE layers", layers_in_words(trace)),
        ("routing score", ", ".join(sorted({entry.score for entry in meta.layers}))),
    ]
    if summary is not None:
        active = f", {summary.active_parameters:,} active per token" if summary.active_parameters else ""
        found.append(("parameters", f"{summary.parameters:,}{active}"))
        if summary.shared_experts:
            found.append(("shared experts", str(summary.shared_experts)))
        size = expert_bytes(summary)
        if size:
            found.append(("one expert", f"{size:,} bytes"))
    found += [
        ("tokens", f"{len(trace):,} in {sequences:,} sequences of {documents:,} documents"),
        ("phases", ", ".join(f"{name} {count:,}" for name, count in zip(PHASES, phases, strict=True) if count)),
        ("data", meta.data),
        ("recorded", f"{meta.created} by collegium {meta.collegium}" + ("" if meta.complete else " (not complete)")),
    ]
    if meta.fingerprint:
        found.append(("fingerprint", meta.fingerprint))
    return found


def domain_tokens(trace: Trace) -> list[tuple[str, int]]:
    """``(domain, its tokens)``."""
    counts = np.bincount(trace.column("domain"), minlength=len(trace.meta.domains))
    return list(zip(trace.meta.domains, counts.tolist(), strict=True))


def expert_bytes(summary: Summary | None) -> int | None:
    """Stored bytes of one expert, the mean over layers; None if not known."""
    sizes = [layer.expert_nbytes for layer in summary.moe_layers if layer.expert_nbytes] if summary else []
    return round(float(np.mean(sizes))) if sizes else None


def layers_in_words(trace: Trace) -> str:
    """How many MoE layers, with how many experts; layers that are alike together."""
    parts = []
    for (E, K, C), group in groupby(
        trace.meta.layers, lambda entry: (entry.num_experts, entry.top_k, entry.iterations)
    ):
        each = f"{K} per token" if C == 1 else f"{K // C} per token in each of {C} iterations"
        parts.append(f"{_span([entry.layer for entry in group])}: {E} experts, {each}")
    shown = parts if len(parts) <= 4 else [*parts[:3], f"and {len(parts) - 3} more kinds"]
    return f"{len(trace.layers)} ({'; '.join(shown)})"


def _span(layers: Sequence[Any]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
