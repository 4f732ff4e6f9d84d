"""How often would a small cache hold the experts that a token needs?

One cache for each layer, kept from one sequence to the next, serves the tokens in reading order. All experts of a token
are looked up before any is loaded or evicted; a first touch is a miss. After a token each missing expert is loaded, and
once the cache is full as many residents that the token does not use are evicted: for LRU those used longest ago, for
SCH (segment cache best hit rate) those with the fewest activations in the m tokens after this one, of equals those used
longest ago. Both are demand caches: SCH looks ahead to choose what to evict, never to load.

Intervals resample blocks of documents with the hits they had in this trace, where each document found in the cache what
the one before it had left; what another order of the documents would do is not in them.

Legend: N tokens, E experts of a layer, K slots a token, C capacities, B blocks of documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.errors import ConfigError
from collegium.measure.estimate import Estimate
from collegium.measure.information import means
from collegium.measure.kernels import each_layer, lru_depths, sch_depths
from collegium.measure.metric import metric
from collegium.measure.tokens import read_tokens
from collegium.rng import seed_of
from collegium.trace import Trace

__all__ = ["CacheCurve", "cache_curves"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class CacheCurve:
    """Hit rates of one layer's expert cache against its capacity.

    Attributes:
        layer: index of the decoder layer.
        capacity: ``[C]`` experts that the cache holds, ascending; never below K.
        ratio: ``[C]`` capacity / K, with K the most experts that a token uses.
        sch: ``[C]`` hits per request, 0 to 1, where evictions look `segment` tokens ahead.
        lru: ``[C]`` hits per request of the least-recently-used cache.
        segment: m.
        first_touch: how the first request of an expert counts.
        requests: expert requests that were served.
        tokens: tokens that made them.
        lru_shuffled: ``[C]`` the same with the tokens of the trace shuffled: what popular experts alone give.
        sch_interval, lru_interval: ``[C, 2]`` ends of 95 % intervals over blocks of documents; None for a trace of one
            document, which says nothing about the spread.
    """

    layer: int
    capacity: Array
    ratio: Array
    sch: Array
    lru: Array
    segment: int
    first_touch: str
    requests: int
    tokens: int
    lru_shuffled: Array
    sch_interval: Array | None = None
    lru_interval: Array | None = None

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row, at the capacity nearest to 2 K."""
        at = int(np.abs(self.ratio - 2).argmin())
        return {
            "layer": self.layer,
            "capacity (experts)": int(self.capacity[at]),
            "capacity / K": float(self.ratio[at]),
            f"SCH {self.segment}": _estimate(self.sch[at], self.sch_interval, at),
            "LRU": _estimate(self.lru[at], self.lru_interval, at),
            "LRU, tokens shuffled": float(self.lru_shuffled[at]),
        }


def _estimate(value: float, interval: Array | None, at: int) -> Estimate:
    low, high = (np.nan, np.nan) if interval is None else interval[at].tolist()
    return Estimate(float(value), low, high)


@metric(
    "cache",
    question="How many of the experts it needs would a token find in a small cache?",
    paper="Not All Models Suit Expert Offloading (2025)",
    arxiv="2505.16056",
)
def cache_curves(
    trace: Trace, segment: int = 16, ratios: Sequence[float] | None = None, *, seed: int = 0
) -> list[CacheCurve]:
    """SCH and LRU hit rates of every traced layer, in order.

    Exact at every capacity: both policies keep stacks, so one pass over all tokens serves all capacities. For the
    intervals it counts the hits of each block of documents apart: a block is a document, or, of more than 64 documents,
    one of 64 equal parts at random.

    Args:
        trace: any; decode order matters, prompts are read token by token.
        segment: tokens that SCH looks ahead.
        ratios: capacities as multiples of K, rounded to whole experts and cut at E; None takes 1, 1.5, 2, 3, 4, 6, 8,
            12, ... up to all E experts.
        seed: of the shuffled control.

    Raises:
        ConfigError: `segment` or a ratio is below 1: a cache must hold what one token needs.
        TraceError: the trace is empty.
    """
    if segment < 1:
        raise ConfigError(f"a segment of {segment} tokens; SCH looks at least 1 token ahead")
    if ratios is not None and not (len(ratios) and all(1 <= ratio < np.inf for ratio in ratios)):
        raise ConfigError(
            f"capacities of {list(ratios)} times K; a cache must hold the K experts of a token, so give ratios from 1"
        )
    tokens = read_tokens(trace)
    shuffle = np.random.default_rng(seed_of("cache", seed)).permutation(len(tokens))

    def one(layer: int, E: int, experts: Array) -> CacheCurve:
        K = min(experts.shape[1], E)
        wanted = _default_ratios(E / K) if ratios is None else ratios
        capacity = np.unique(np.minimum(np.rint(np.multiply(wanted, K)), E).astype(np.int64))
        requests_B = np.bincount(tokens.block, (experts < E).sum(1), tokens.num_blocks)
        requests = int(requests_B.sum())

        def hits(depths_BE: Array) -> Array:
            return np.cumsum(depths_BE, 1)[:, capacity - 1]

        sch_BC = hits(sch_depths(experts, E, min(segment, len(tokens)), tokens.block, tokens.num_blocks))
        lru_BC = hits(lru_depths(experts, E, tokens.block, tokens.num_blocks))
        shuffled_BC = hits(lru_depths(experts[shuffle], E, tokens.block, tokens.num_blocks))
        sch, lru, lru_shuffled = (found.sum(0) / max(requests, 1) for found in (sch_BC, lru_BC, shuffled_BC))
        sch_interval, lru_interval = _intervals(sch_BC, lru_BC, requests_B)
        return CacheCurve(
            layer=layer,
            capacity=capacity,
            ratio=capacity / K,
            sch=sch,
            lru=lru,
            segment=segment,
            first_touch="miss",
            requests=requests,
            tokens=len(tokens),
            lru_shuffled=lru_shuffled,
            sch_interval=sch_interval,
            lru_interval=lru_interval,
        )

    return each_layer(trace, tokens, one)


def _intervals(sch_BC: Array, lru_BC: Array, requests_B: Array) -> tuple[Array | None, Array | None]:
    """``([C, 2], [C, 2])`` intervals of hits per request, by the same resamples; None without a spread."""
    found = means(np.column_stack([sch_BC, lru_BC, requests_B]), (0, 1))
    ends = np.array([(estimate.low, estimate.high) for estimate in found])
    return (None, None) if np.isnan(ends).any() else (ends[: len(ends) // 2], ends[len(ends) // 2 :])


def _default_ratios(most: float) -> list[float]:
    """1, 1.5, 2, 3, 4, 6, 8, 12, ... below `most`, and `most`."""
    steps = [step * 2.0**power for power in range(17) for step in (1.0, 1.5)]
    return [*(ratio for ratio in steps if ratio < most), most]
