"""Does the load of the experts change in the course of a trace?

Legend: N tokens, W windows, E experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.errors import ConfigError
from collegium.measure.estimate import Estimate
from collegium.measure.kernels import count_by, each_layer
from collegium.measure.metric import metric
from collegium.measure.tokens import Tokens, read_tokens
from collegium.rng import seed_of
from collegium.trace import Trace

__all__ = ["Drift", "drift"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Drift:
    """Load of one layer's experts over time.

    Attributes:
        layer: index of the decoder layer.
        share: ``[W, E]`` fraction of each window's assignments that each expert gets.
        shift: ``[W]`` total variation distance, 0 to 1, of a window's share from the whole layer's: the fraction of
            its assignments that would have to move.
        control: mean shift when the documents are taken in random order: what windows of that size differ by anyway.
    """

    layer: int
    share: Array
    shift: Array
    control: float

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row."""
        return {
            "layer": self.layer,
            "windows": len(self.shift),
            "mean shift": float(self.shift.mean()),
            "documents in random order": self.control,
            "largest shift": float(self.shift.max()),
            "in window": int(self.shift.argmax()),
        }


@metric(
    "drift",
    question="Does the load change in the course of the trace?",
    paper="total variation distance of windows from the whole (standard)",
    iterated=True,
)
def drift(trace: Trace, windows: int = 20, *, seed: int = 0) -> list[Drift]:
    """The load of every traced layer in equal runs of rows, in the order they were recorded.

    Args:
        trace: any.
        windows: how many runs; fewer if there are fewer tokens.
        seed: of the order of documents in the control.

    Raises:
        ConfigError: `windows` is below 1.
        TraceError: the trace is empty.
    """
    if windows < 1:
        raise ConfigError(f"drift over {windows} windows; it takes at least 1")
    tokens = read_tokens(trace)
    N, W = len(tokens), min(windows, len(tokens))
    row = np.arange(N) if tokens.order is None else tokens.order
    recorded = (row * W // N).astype(np.int32)
    shuffled = (_document_order(tokens, seed) * W // N).astype(np.int32)

    def one(layer: int, E: int, experts: Array) -> Drift:
        share, shift = _shift(count_by(experts, recorded, W, E))
        _, control = _shift(count_by(experts, shuffled, W, E))
        return Drift(layer, share, shift, float(control.mean()))

    return each_layer(trace, tokens, one)


def _document_order(tokens: Tokens, seed: int) -> Array:
    """``[N]`` place of each token when whole documents come in random order."""
    rank = np.random.default_rng(seed_of("drift", seed)).permutation(tokens.num_documents)
    place = np.empty(len(tokens), np.int64)
    place[np.argsort(rank[tokens.document], kind="stable")] = np.arange(len(tokens))
    return place


def _shift(counts_WE: Array) -> tuple[Array, Array]:
    """``(share [W, E], shift [W])``; a window without an assignment shifts nothing."""
    total_W = counts_WE.sum(1)
    share_WE = counts_WE / np.maximum(total_W, 1)[:, None]
    overall_E = counts_WE.sum(0) / max(int(total_W.sum()), 1)
    shift_W = np.abs(share_WE - overall_E).sum(1) / 2
    return share_WE, np.where(total_W > 0, shift_W, 0.0)
