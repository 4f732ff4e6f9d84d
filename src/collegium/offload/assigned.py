"""The assignments of one layer of one pass, sorted by expert: what the engine loads, computes and adds up.

Legend: T tokens, K slots, E experts of the layer, A assignments, n distinct experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from collegium.offload.geometry import Array
from collegium.offload.precision.base import SKIP

__all__ = ["Assigned", "sort"]


@dataclass(eq=False)
class Assigned:
    """Rows sorted by expert, then slot, then token: the order of transformers' loop over experts.

    Attributes:
        experts: ``[n]`` distinct ids, ascending.
        edges: n + 1 numbers: the rows of expert i are ``edges[i] .. edges[i + 1] - 1``.
        token, weight: ``[A]`` of each row.
        mass: ``[n]`` sums of weights.
        bits: ``[n]`` copy of each.
        skipped: assignments that a precision policy left out.
    """

    experts: Array
    edges: list[int]
    token: Tensor
    weight: Tensor
    mass: Array
    bits: Array
    skipped: int
    rows: dict[int, tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = dict(zip(self.experts.tolist(), pairwise(self.edges), strict=True))

    @property
    def counts(self) -> Array:
        """``[n]`` rows of each expert."""
        return np.diff(self.edges)


def sort(experts: Array, weight: Tensor, weights: Array, E: int, wanted: Array | None, bits: int) -> Assigned:
    """Sort the assignments of a layer.

    Args:
        experts: ``[T, K]`` ids, from E on unused slots.
        weight, weights: ``[T, K]`` as the router gave them, and in float32.
        wanted: ``[T, K]`` bits of each assignment or `SKIP`; None is `bits` for all.
    """
    T = len(experts)
    if T == 1 and wanted is None and int(experts.max()) < E:  # a token of one sequence: nothing to group
        order = experts[0].argsort()
        n = len(order)
        copies = np.full(n, bits, np.uint8)
        return Assigned(
            experts[0, order],
            list(range(n + 1)),
            torch.zeros(n, dtype=torch.long),
            weight[0, torch.from_numpy(order)],
            weights[0, order],
            copies,
            0,
        )
    ids = experts.T.reshape(-1)
    live = ids < E
    skipped = 0
    if wanted is not None:
        kept = live & (wanted.T.reshape(-1) != SKIP)
        skipped, live = int(live.sum() - kept.sum()), kept
    order = np.argsort(ids, kind="stable")
    order = order[live[order]]
    distinct, first = np.unique(ids[order], return_index=True)
    slot, token = np.divmod(order, max(T, 1))
    copies, mass = np.full(len(distinct), bits, np.uint8), np.zeros(len(distinct), np.float32)
    if len(distinct):
        mass = np.add.reduceat(weights[token, slot], first)
        if wanted is not None:
            copies = np.maximum.reduceat(wanted[token, slot], first)
    rows = torch.from_numpy(token)
    edges = [*first.tolist(), len(order)]
    return Assigned(distinct, edges, rows, weight[rows, torch.from_numpy(slot)], mass, copies, skipped)
