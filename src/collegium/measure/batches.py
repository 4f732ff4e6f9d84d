"""Batches for a pass over a model: the columns of their tokens, and the sequences of a trace as batches.

Legend: B sequences, S positions of a batch, T = B * S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collegium.errors import ConfigError, ModelError
from collegium.measure.tokens import read_tokens
from collegium.rng import seed_of
from collegium.sites import sites
from collegium.trace import Trace
from collegium.trace.rows import spread
from collegium.trace.run import Batch

__all__ = ["batch_columns", "trace_batches"]


def batch_columns(batch: Batch, ids: Tensor, mask: Tensor, num_domains: int) -> dict[str, Tensor]:
    """``[T]`` document, domain, position and valid of a batch; documents are rows if not given.

    Raises:
        ConfigError: a domain is no index into the `num_domains`.
    """
    B, S = ids.shape
    given = {
        "document": batch.get("document", torch.arange(B)),
        "domain": batch.get("domain", torch.zeros(B, dtype=torch.long)),
        "position": batch.get("position", mask.cumsum(1).sub(1).clamp(min=0)),
    }
    columns = {key: torch.from_numpy(spread(values, B, S).astype(np.int64)) for key, values in given.items()}
    domain = columns["domain"]
    if domain.numel() and not 0 <= int(domain.min()) <= int(domain.max()) < num_domains:
        raise ConfigError(f"domain {int(domain.max())} is no index into the {num_domains} domains")
    return {**columns, "valid": mask.reshape(-1).cpu()}


def trace_batches(trace: Trace, model: Any, max_tokens: int | None = None, *, seed: int = 0) -> Iterator[Batch]:
    """The sequences of `trace` as batches of one for `collect`, in random order, up to `max_tokens` tokens in all.

    Raises:
        ModelError: the trace is of another model: other layers, numbers of experts, or more token ids.
        TraceError: the trace is empty.
    """
    mine = {site.layer: site.num_experts for site in sites(model)}
    theirs = {entry.layer: entry.num_experts for entry in trace.meta.layers}
    tokens = read_tokens(trace)
    vocabulary = model.get_input_embeddings().num_embeddings
    if mine != theirs or int(tokens.token.max()) >= vocabulary:
        raise ModelError(
            f"{trace.folder} is not a trace of this model: experts by layer are {theirs} and {mine}, the highest token "
            f"id is {int(tokens.token.max())} of {vocabulary}"
        )
    left = len(tokens) if max_tokens is None else max_tokens
    order = np.random.default_rng(seed_of("trace batches", seed)).permutation(len(tokens.starts) - 1)
    return _sequences(tokens, order.tolist(), left)


def _sequences(tokens: Any, order: list[int], left: int) -> Iterator[Batch]:
    columns = {name: getattr(tokens, name) for name in ("token", "position", "document", "domain")}
    for sequence in order:
        if left <= 0:
            return
        first = int(tokens.starts[sequence])
        rows = slice(first, min(int(tokens.starts[sequence + 1]), first + left))
        batch = {name: torch.from_numpy(values[rows].astype(np.int64))[None] for name, values in columns.items()}
        left -= batch["token"].shape[1]
        yield {"input_ids": batch.pop("token"), **batch}
