"""How often would a small cache hold the experts that a token needs?

One cache for each layer, kept from one sequence to the next, serves the tokens in reading order. All experts of a token
are looked up before any is loaded or evicted; a first touch is a miss. After a token each missing expert is loaded, and
once the cache is full as many residents that the token does not use are evicted: for LRU those used longest ago, for
SCH (segment cache best hit rate) those with the fewest activations in the m tokens after this one, of equals those used
longest ago. Both are demand caches: SCH looks ahead to choose what to evict, never to load.

Legend: N tokens, E experts of a layer, K slots a token, C capacities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.errors import ConfigError
from collegium.measure.estimate import Estimate
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

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row, at the capacity nearest to 2 K."""
        at = int(np.abs(self.ratio - 2).argmin())
        return {
            "layer": self.layer,
            "capacity (experts)": int(self.capacity[at]),
            "capacity / K": float(self.ratio[at]),
            f"SCH {self.segment}": float(self.sch[at]),
            "LRU": float(self.lru[at]),
            "LRU, tokens shuffled": float(self.lru_shuffled[at]),
        }


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

    Exact at every capacity: both policies keep stacks, so one pass over all tokens serves all capacities.

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
        requests = int((experts < E).sum())

        def hit_rate(depths: Array) -> Array:
            return np.cumsum(depths)[capacity - 1] / max(requests, 1)

        return CacheCurve(
            layer=layer,
            capacity=capacity,
            ratio=capacity / K,
            sch=hit_rate(sch_depths(experts, E, min(segment, len(tokens)))),
            lru=hit_rate(lru_depths(experts, E)),
            segment=segment,
            first_touch="miss",
            requests=requests,
            tokens=len(tokens),
            lru_shuffled=hit_rate(lru_depths(experts[shuffle], E)),
        )

    return each_layer(trace, tokens, one)


def _default_ratios(most: float) -> list[float]:
    """1, 1.5, 2, 3, 4, 6, 8, 12, ... below `most`, and `most`."""
    steps = [step * 2.0**power for power in range(17) for step in (1.0, 1.5)]
    return [*(ratio for ratio in steps if ratio < most), most]
