"""What a model's passes take in memory, measured before an expert is read: interpreter, libraries and compiled kernels
cannot be counted, nor the largest intermediate results.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from collegium.experts.stored import ExpertLayout
from collegium.offload.arithmetic import Kind, arithmetic
from collegium.offload.precision.base import PrecisionPolicy
from collegium.offload.slots import SlotPool
from collegium.offload.store import ExpertSource
from collegium.process import peak_memory, resident_memory
from collegium.sites import Site

__all__ = ["Needs", "measure", "trim"]

_KEYS = 16  # enough for attention's kernel


@dataclass(frozen=True)
class Needs:
    """Bytes that were measured.

    Attributes:
        resident: held by the process with the model loaded and everything compiled.
        working: more than that at the peak of a pass.
        cache_start, cache_token: of one sequence's cache, at its start and for each token.
    """

    resident: int
    working: int
    cache_start: float
    cache_token: float


@torch.inference_mode()
def measure(
    model: Any, found: list[Site], source: ExpertSource, precision: PrecisionPolicy, kind: Kind, chunk: int
) -> Needs:
    """Run the model without its experts on the largest pass and on one token, and one expert on as many rows."""
    short = max(1, chunk // 2)
    _forward(model, 1)  # compiles and starts what is done once
    _forward(model, min(_KEYS, chunk), more=True)  # attention's kernel is for a token with some past
    _forward_experts(found, source, precision, kind, model.dtype, 1, 1)
    with _peak() as few:
        first = _forward(model, short)
    with _peak() as many:
        second = _forward(model, chunk)
    rows = max(layer.top_k for layer in source.layers) * chunk
    with _peak() as experts:
        _forward_experts(found, source, precision, kind, model.dtype, chunk, rows)
    slope = max(0.0, (second - first) / max(chunk - short, 1))
    # layers are alike, so the peak is where the cache of a pass, which is counted by itself, is full
    working = max(0, few.bytes - first, many.bytes - second) + experts.bytes
    trim()  # what the passes have left in the heap is counted as working already
    return Needs(resident_memory(), working, max(0.0, second - slope * chunk), slope)


def _forward(model: Any, tokens: int, more: bool = False) -> int:
    """One pass of so many tokens, and one `more` of a single token; bytes of the cache after it."""
    cache = DynamicCache(config=model.config)
    for count in (tokens, 1) if more else (tokens,):
        ids = torch.zeros(1, count, dtype=torch.long)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return sum(tensor.nbytes for layer in cache.layers for tensor in vars(layer).values() if isinstance(tensor, Tensor))


def _forward_experts(
    found: list[Site],
    source: ExpertSource,
    precision: PrecisionPolicy,
    kind: Kind,
    dtype: torch.dtype,
    tokens: int,
    rows: int,
) -> None:
    """An expert of zeros in each layout there is, with all rows of a pass of so many tokens."""
    layouts: dict[ExpertLayout, tuple[Site, int]] = {}
    for site, layer in zip(found, source.layers, strict=True):
        for bits in precision.used_bits:
            layouts.setdefault(layer.layouts[bits], (site, rows))
    for layout, (site, count) in layouts.items():
        slot = SlotPool(1, layout.nbytes)
        run = arithmetic(kind, layout, site.experts)
        x, token = torch.zeros(tokens, layout.d, dtype=dtype), torch.arange(count) % tokens
        wide, out = run.rows(x, count)
        run.compute(wide, token, [(slot.record(0, layout.nbytes), 0, count)], out)
        run.combine(out, token, torch.ones(count), [0, count], x)


class _Peak:
    bytes = 0


@contextmanager
def _peak() -> Iterator[_Peak]:
    """How much more was held within the context than before it, at the most. Linux only; 0 elsewhere."""
    found, reset = _Peak(), Path("/proc/self/clear_refs")
    before = resident_memory()
    if reset.exists():
        reset.write_text("5")  # the peak starts again from here
    yield found
    found.bytes = max(0, peak_memory() - before)


def trim() -> None:
    """Give back to the system what loading has left in the C library's heap; glibc only."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
