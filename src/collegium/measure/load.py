"""How evenly the experts of each layer are used.

Legend: L traced layers, E experts of a layer, n_e assignments of expert e.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.trace import Trace

__all__ = ["Load", "load"]


@dataclass(frozen=True, eq=False)
class Load:
    """Use of one layer's experts.

    Attributes:
        layer: index of the decoder layer.
        counts: ``[E]`` assignments n_e.
        share: ``[E]`` fraction of the layer's assignments; sums to 1 (all zero for an empty trace).
        max_violation: MaxVio, ``max_e n_e / mean_e n_e - 1``; 0 at perfect balance, E - 1 when one expert gets all.
        entropy: of `share`, in bits; log2(E) at perfect balance.
        dead: ids of experts without a single assignment.
    """

    layer: int
    counts: np.ndarray[Any, np.dtype[np.int64]]
    share: np.ndarray[Any, np.dtype[np.float64]]
    max_violation: float
    entropy: float
    dead: tuple[int, ...]


def load(trace: Trace) -> list[Load]:
    """The load of every traced layer, in order; streamed, so the trace may be longer than memory."""
    found = []
    for layer, counts in zip(trace.layers, trace.counts(), strict=True):
        counts = counts[: trace.meta.layer(layer).num_experts]
        total = counts.sum()
        share = counts / max(total, 1)
        used = share[share > 0]
        found.append(
            Load(
                layer=layer,
                counts=counts,
                share=share,
                max_violation=float(share.max() * len(share) - 1) if total else 0.0,
                entropy=float(-(used * np.log2(used)).sum()),
                dead=tuple(np.flatnonzero(counts == 0).tolist()),
            )
        )
    return found
