"""`Statistics` of counts that another program recorded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch

from collegium._version import __version__
from collegium.errors import StatisticsError
from collegium.measure.collect import Counts
from collegium.measure.statistics import META, LayerEntry, Statistics, StatisticsMeta
from collegium.trace.importers import Counted, Known, read_counts

__all__ = ["import_statistics", "statistics_of_counts"]


def import_statistics(
    format: str,
    files: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    known: Known | None = None,
    *,
    overwrite: bool = False,
) -> tuple[Statistics, tuple[str, ...]] | None:
    """Read the counts in `files` of a format into statistics at `out`; None, and nothing written, if they hold tokens.

    Returns:
        The statistics, and notes on what the files do not say (they are in ``meta.data`` too).

    Raises:
        ConfigError: no such format, no files, something must be known that is not, or `out` holds something else.
        TraceError: a file is damaged, or its counts are not understood; it and the field are named.
        StatisticsError: `out` holds statistics already and `overwrite` is not set.
    """
    paths, known, out = [Path(file) for file in files], known or Known(), Path(out)
    counted = read_counts(format, paths, known)
    if counted is None:
        return None
    if (out / META).exists() and not overwrite:
        raise StatisticsError(f"{out} holds statistics already; replace them (--overwrite), or choose another folder")
    found, notes = statistics_of_counts(counted, known, f"{format}: {', '.join(path.name for path in paths)}")
    found.save(out)
    return found, notes


def statistics_of_counts(counted: Counted, known: Known, source: str) -> tuple[Statistics, tuple[str, ...]]:
    """``n [E]`` of each layer and, where K divides their sum in every layer, ``n_tokens []``; and notes."""
    model, notes = known.model, counted.notes
    totals = [int(row.sum()) for row in counted.counts]
    whole = all(total % entry.top_k == 0 for total, entry in zip(totals, counted.layers, strict=True))
    tokens = [total // entry.top_k for total, entry in zip(totals, counted.layers, strict=True)]
    if not whole:
        notes += ("the number of tokens is not known: K does not divide the sum of the counts of every layer",)
    entries = Counts.statistics if whole else tuple(entry for entry in Counts.statistics if entry.name == "n")
    meta = StatisticsMeta(
        model=model.name if model else "unknown",
        fingerprint=model.fingerprint if model else None,
        family=model.family if model else "unknown",
        num_layers=max(model.num_layers if model else counted.total, counted.layers[-1].layer + 1),
        layers=tuple(
            LayerEntry(
                layer=entry.layer,
                path=entry.path,
                num_experts=entry.num_experts,
                top_k=entry.top_k,
                hidden_size=model.hidden_size if model else 0,
                intermediate_size=model.intermediate_size if model else 0,
            )
            for entry in counted.layers
        ),
        data=(". ".join([f"imported from {source}", *notes]),),
        domains=("unknown",),
        tokens=max(tokens) if whole else 0,
        statistics=entries,
        collectors={Counts.name: {}},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        collegium=__version__,
    )
    tensors = {}
    for entry, row, count in zip(counted.layers, counted.counts, tokens, strict=True):
        tensors[entry.layer, "n"] = torch.tensor(row)[None]
        if whole:
            tensors[entry.layer, "n_tokens"] = torch.tensor([count])
    return Statistics(meta, tensors), notes
