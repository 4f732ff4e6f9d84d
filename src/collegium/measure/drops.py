"""Slots that tokens did not get, by position: does a capacity limit starve the end of a sequence?

Legend: N tokens, C domains, bins of positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.measure.estimate import Estimate
from collegium.measure.metric import metric
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
    """

    layer: int
    position: Array
    ratio: Array
    domains: tuple[str, ...]
    by_domain: Array
    tokens: Array

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row."""
        weight = self.tokens.sum(0)
        return {
            "layer": self.layer,
            "slots without an expert": float(self.ratio @ weight / max(weight.sum(), 1)),
            "in the first positions": float(self.ratio[0]),
            "in the last positions": float(self.ratio[-1]),
        }


@metric("drops", question="Are tokens dropped, and where?", paper="OpenMoE (2024)", arxiv="2402.01739")
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
    C, layers = len(trace.meta.domains), trace.layers
    tokens, empty = np.zeros(C * bins, np.int64), np.zeros((len(layers), C * bins), np.int64)
    for part in trace.iter_parts(["position", "domain", *(f"expert_{layer}" for layer in layers)]):
        place = part.column("position").astype(np.int64) * bins // (last + 1)
        cell = part.column("domain").astype(np.int64) * bins + place
        tokens += np.bincount(cell, minlength=C * bins)
        for row, layer in enumerate(layers):
            missing = trace.meta.layer(layer).top_k - np.diff(part.assignments(layer)[0])
            short = missing > 0
            if short.any():
                empty[row] += np.bincount(cell[short], missing[short], C * bins).astype(np.int64)
    edges = -(-np.arange(bins) * (last + 1) // bins)
    stood = tokens.reshape(C, bins)
    found = []
    for row, layer in enumerate(layers):
        lost = empty[row].reshape(C, bins)
        slots = stood * trace.meta.layer(layer).top_k
        ratio = lost.sum(0) / np.maximum(slots.sum(0), 1)
        found.append(Drops(layer, edges, ratio, trace.meta.domains, lost / np.maximum(slots, 1), stood))
    return found
