"""A calibration on several processes: each streams its share of the batches, and their statistics are added up."""

from __future__ import annotations

from datetime import timedelta
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist

from collegium.measure.statistics import Statistics
from collegium.train.ranks import Ranks

__all__ = ["add_up", "open_group"]

_WAIT = timedelta(days=30)
"""How long a process waits for the slowest: after a kill one may have a layer to do and another all of them."""


def open_group(ranks: Ranks) -> Any:
    """A process group for `add_up`; None for one process. To be opened by all processes before the work begins."""
    return None if ranks.mesh is None else dist.new_group(timeout=_WAIT)


def add_up(statistics: Statistics, ranks: Ranks, group: Any) -> Statistics:
    """The statistics of all processes as one pass; the same on every process.

    Args:
        statistics: those of this process, of its own tokens.
        group: from `open_group`.
    """
    if group is None:
        return statistics
    parts: list[dict[tuple[int, str], torch.Tensor]] = [{} for _ in range(ranks.world)]
    counts = torch.zeros(ranks.world, dtype=torch.int64, device=ranks.device)
    counts[ranks.rank] = statistics.meta.tokens
    dist.all_reduce(counts, group=group)
    for key in sorted(statistics.tensors):
        for part, tensor in zip(parts, _gather(statistics.tensors[key].to(ranks.device), ranks, group), strict=True):
            part[key] = tensor.cpu()
    passes = [
        Statistics(statistics.meta.model_copy(update={"tokens": count}), part)
        for part, count in zip(parts, counts.tolist(), strict=True)
    ]
    total = reduce(Statistics.add, passes)
    # it is one pass over one set of texts
    return Statistics(total.meta.model_copy(update={"data": statistics.meta.data}), total.tensors)


def _gather(mine: torch.Tensor, ranks: Ranks, group: Any) -> list[torch.Tensor]:
    """The tensor of every process. They may differ in their first size: a sample has no more rows than there were."""
    rows = mine if mine.dim() else mine[None]
    sizes = torch.zeros(ranks.world, dtype=torch.int64, device=ranks.device)
    sizes[ranks.rank] = len(rows)
    dist.all_reduce(sizes, group=group)
    padded = rows.new_zeros(int(sizes.max()), *rows.shape[1:])
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in range(ranks.world)]
    dist.all_gather(found, padded, group=group)
    return [one[:size] if mine.dim() else one[0] for one, size in zip(found, sizes.tolist(), strict=True)]
