"""Slots that tokens did not get, by position: does a capacity limit starve the end of a sequence?

Legend: N tokens, C domains, B blocks of documents, bins of positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.measure.estimate import Estimate, bootstrap
from collegium.measure.metric import metric
from collegium.measure.tokens import read_tokens
from collegium.trace import Trace

__all__ = ["Drops", "drops"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Drops:
    """Slots without an expert in one layer.

    Attributes:
        layer: index of the decoder layer.
        position: ``[bins]`` lower edges of equal bins of positions.
        ratio: ``[bins]`` empty or dropped slots / (tokens x top_k); 0 where no token stands.
        domains: names of the rows of `by_domain`.
        by_domain: ``[C, bins]`` the same for each domain.
        tokens: ``[C, bins]`` tokens that stand there.
        overall: the ratio of all positions together.
        interval: ``[bins, 2]`` ends of 95 % intervals of `ratio` over blocks of documents, NaN where no token stands or
            those of one document; None for a trace of one document.
    """

    layer: int
    position: Array
    ratio: Array
    domains: tuple[str, ...]
    by_domain: Array
    tokens: Array
    overall: Estimate
    interval: Array | None = None

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row."""
        return {
            "layer": self.layer,
            "slots without an expert": self.overall,
            "in the first positions": self._at(0),
            "in the last positions": self._at(-1),
        }

    def _at(self, place: int) -> Estimate:
        low, high = (np.nan, np.nan) if self.interval is None else self.interval[place].tolist()
        return Estimate(float(self.ratio[place]), low, high)


@metric("drops", question="Are tokens dropped, and where?", paper="OpenMoE (2024)", arxiv="2402.01739", iterated=True)
def drops(trace: Trace, *, bins: int = 16) -> list[Drops]:
    """Drop-towards-the-end: the share of empty slots along the sequence, in every traced layer.

    A slot is empty where a capacity limit dropped the assignment, or where the router chose fewer than top_k experts.
    A model with a fixed K and no capacity gives zeros; one with a variable number of experts (top-p, null experts)
    shows how many it leaves out, which is no loss. Tokens with more than top_k experts count as full. Where capacity
    is filled over a whole batch, later sequences of it are dropped, not later positions.

    Args:
        trace: any.
        bins: of equal width from position 0 to the last; fewer where there are fewer positions.
    """
    last = max((int(part.column("position").max(initial=0)) for part in trace.iter_parts(["position"])), default=0)
    bins = max(1, min(bins, last + 1))
    block, B = np.empty(0, np.uint8), 1
    if len(trace):
        read = read_tokens(trace)
        block, B = read.recorded_block(), read.num_blocks
    C, layers = len(trace.meta.domains), trace.layers
    # each table twice: by domain, and below that by block
    tokens, empty = np.zeros((C + B) * bins, np.int64), np.zeros((len(layers), (C + B) * bins), np.int64)
    for part in trace.iter_parts(["position", "domain", *(f"expert_{layer}" for layer in layers)]):
        place = part.column("position").astype(np.int64) * bins // (last + 1)
        of_block = (C + block[part.start : part.start + len(part)].astype(np.int64)) * bins + place
        of_domain = part.column("domain").astype(np.int64) * bins + place
        tokens += np.bincount(np.concatenate([of_domain, of_block]), minlength=len(tokens))
        for row, layer in enumerate(layers):
            missing = trace.meta.layer(layer).top_k - np.diff(part.assignments(layer)[0])
            short = missing > 0
            if short.any():
                cells = np.concatenate([of_domain[short], of_block[short]])
                empty[row] += np.bincount(cells, np.tile(missing[short], 2), len(tokens)).astype(np.int64)
    edges = -(-np.arange(bins) * (last + 1) // bins)
    stood = tokens.reshape(C + B, bins)
    return [
        _drops(layer, edges, trace.meta.domains, empty[row].reshape(C + B, bins), stood, trace.meta.layer(layer).top_k)
        for row, layer in enumerate(layers)
    ]


def _drops(layer: int, edges: Array, domains: tuple[str, ...], lost: Array, stood: Array, K: int) -> Drops:
    """From empty slots and tokens ``[C + B, bins]``, by domain and by block."""
    C, bins = len(domains), len(edges)
    by_domain = lost[:C] / np.maximum(stood[:C] * K, 1)
    ratio = lost[:C].sum(0) / np.maximum(stood[:C].sum(0) * K, 1)
    filled = np.flatnonzero(stood[:C].any(0))
    # one more column for all positions; what no resampled document reaches is not known there
    sums = np.stack([np.column_stack([part[C:, filled], part[C:].sum(1)]) for part in (lost, stood * K)], 1)

    def ratios(total: Array) -> Array:
        return np.divide(total[0], total[1], out=np.full(len(filled) + 1, np.nan), where=total[1] > 0)

    *by_bin, overall = bootstrap(sums, ratios, bounds=(0, 1)) if len(filled) else [Estimate(0.0, np.nan, np.nan)]
    interval = np.full((bins, 2), np.nan)
    interval[filled] = np.array([(estimate.low, estimate.high) for estimate in by_bin]).reshape(-1, 2)
    known = None if np.isnan(interval).all() else interval
    return Drops(layer, edges, ratio, domains, by_domain, stood[:C], overall, known)
