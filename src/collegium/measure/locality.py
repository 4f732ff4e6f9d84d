"""Do the experts of a token stay in use for the tokens after it?

Segment routing best performance (SRP): routing is imitated by a router that decides once for m tokens in a row which
experts are on. Knowing the m tokens it can do no better than to switch on the experts that at least alpha of them use;
SRP is the best F1 it reaches over alpha. 1 means that experts never change within m tokens.

Legend: N tokens, E experts of a layer, M segment lengths m, B blocks of documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.errors import ConfigError
from collegium.measure.estimate import Estimate, bootstrap
from collegium.measure.kernels import each_layer, segment_routers, window_counts
from collegium.measure.metric import metric
from collegium.measure.tokens import Tokens, read_tokens
from collegium.rng import seed_of
from collegium.trace import Trace

__all__ = ["Locality", "local_routing_consistency"]

Array = np.ndarray[Any, np.dtype[Any]]

SEGMENTS = (4, 16, 64, 256)


@dataclass(frozen=True, eq=False)
class Locality:
    """Local routing consistency of one layer, or of the whole model.

    Numbers are NaN for segments longer than every sequence, and for an expert that none of the windows holds.

    Attributes:
        layer: index of the decoder layer; None for all experts of all layers as one group.
        segments: ``[M]`` tokens of a segment, m.
        srp: SRP of the group for each m, with one alpha for all its experts.
        size_ratio: ``[M]`` experts that the best segment router switches on, relative to the true router (rho).
        srp_expert: ``[M, E]`` SRP of each expert with an alpha of its own; ``[M, 0]`` for the whole model.
        shuffled: ``[M]`` SRP with the tokens of the trace shuffled: what popular experts alone give.
        bound: ``[M]`` F1 of switching on every expert, ``2 a / (1 + a)`` for an activation rate a; SRP is never below.
    """

    layer: int | None
    segments: Array
    srp: tuple[Estimate, ...]
    size_ratio: Array
    srp_expert: Array
    shuffled: Array
    bound: Array

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row: everything of the segment nearest to 16 tokens, and SRP of the others."""
        row: dict[str, int | float | str | Estimate | None] = {"layer": "all" if self.layer is None else self.layer}
        middle = int(np.abs(self.segments - 16).argmin())
        m = int(self.segments[middle])
        row |= {
            f"SRP {m}": self.srp[middle],
            f"shuffled {m}": float(self.shuffled[middle]),
            f"size {m}": float(self.size_ratio[middle]),
        }
        for at, length in enumerate(self.segments.tolist()):
            if at != middle:
                row[f"SRP {length}"] = self.srp[at].value
        return row


@metric(
    "locality",
    question="Do neighbouring tokens use the same experts?",
    paper="Not All Models Suit Expert Offloading (2025)",
    arxiv="2505.16056",
)
def local_routing_consistency(trace: Trace, segments: Sequence[int] = SEGMENTS, *, seed: int = 0) -> list[Locality]:
    """SRP of every traced layer in order, and of the whole model last.

    Windows slide by one token within each sequence; only full ones count. Matches, predictions and true activations
    of a group's experts are summed before F1 is formed.

    Args:
        trace: any; sequences shorter than a segment have no window.
        segments: lengths in tokens.
        seed: of the shuffled control.

    Raises:
        ConfigError: a segment length is below 1, or there is none.
        TraceError: the trace is empty.
    """
    if not len(segments) or min(segments) < 1:
        raise ConfigError(f"segment lengths {list(segments)}: give whole numbers of at least 1")
    lengths = np.unique(segments)
    tokens = read_tokens(trace)
    shuffle = np.random.default_rng(seed_of("locality", seed)).permutation(len(tokens))
    windows_MB = [_windows(tokens, m) for m in lengths]

    def one(layer: int, E: int, experts: Array) -> tuple[Locality, Array, Array]:
        by_expert, by_block = _histograms(experts, tokens, lengths, E, windows_MB)
        shuffled = _histograms(experts[shuffle], tokens, lengths, E, windows_MB)[1].sum(0)
        srp_expert = np.array([segment_routers(row, lengths)[:, 0] for row in by_expert]).T
        return _locality(layer, lengths, by_block, shuffled, srp_expert), by_block, shuffled

    found, blocks, shuffles = zip(*each_layer(trace, tokens, one), strict=True)
    return [*found, _locality(None, lengths, sum(blocks), sum(shuffles), np.empty((len(lengths), 0)))]


def _windows(tokens: Tokens, m: int) -> Array:
    """``[B]`` windows of m tokens in each block."""
    count = np.maximum(np.diff(tokens.starts) - m + 1, 0)
    return np.bincount(tokens.block[tokens.starts[:-1]], weights=count, minlength=tokens.num_blocks).astype(np.int64)


def _histograms(experts: Array, tokens: Tokens, lengths: Array, E: int, windows_MB: list[Array]) -> tuple[Array, Array]:
    """``[E, sum of (m + 1)]`` and ``[B, sum of (m + 1)]``: how many windows hold an expert 0 .. m times.

    The lengths stand side by side, so that one resampling of blocks serves them all.
    """
    found = []
    for m, windows_B in zip(lengths, windows_MB, strict=True):
        by_expert, by_block = window_counts(experts, tokens.starts, tokens.block, m, E, tokens.num_blocks)
        by_expert[:, 0] = windows_B.sum() - by_expert[:, 1:].sum(1)
        by_block[:, 0] = windows_B * E - by_block[:, 1:].sum(1)
        found.append((by_expert, by_block))
    by_experts, by_blocks = zip(*found, strict=True)
    return np.concatenate(by_experts, axis=1), np.concatenate(by_blocks, axis=1)


def _locality(layer: int | None, lengths: Array, by_block: Array, shuffled: Array, srp_expert: Array) -> Locality:
    found = segment_routers(by_block.sum(0), lengths)
    defined = np.flatnonzero(~np.isnan(found[:, 0]))
    srp = [Estimate(np.nan, np.nan, np.nan)] * len(lengths)
    if len(defined):
        filled = by_block[by_block.any(1)]
        estimates = bootstrap(filled, lambda windows: segment_routers(windows, lengths)[defined, 0], bounds=(0, 1))
        for at, estimate in zip(defined, estimates, strict=True):
            srp[at] = estimate
    return Locality(
        layer=layer,
        segments=lengths,
        srp=tuple(srp),
        size_ratio=found[:, 1],
        srp_expert=srp_expert,
        shuffled=segment_routers(shuffled, lengths)[:, 0],
        bound=found[:, 2],
    )
