"""Score thresholds: experts that weigh little for a token are served from the low copy, or left out (HOBBIT).

The experts of a token are sorted by combine weight, largest first, the weights divided by their sum. The unimportance
of an expert is the sum of the weights before it:

    s_i = w_0 + ... + w_(i-1),   high copy if s_i <= T1,   low copy if T1 < s_i <= T2,   left out if s_i > T2

so the first is always served from the high copy. The weights that are used stay as they are: of the weight of what was
left out nobody else gets a share. Prompts are served from the high copy throughout.

Legend: T tokens of a pass, K slots, E experts of a layer, N tokens of a trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.precision.base import SKIP, Choice, PrecisionPolicy, PrecisionSettings
from collegium.offload.precision.fixed import Fixed
from collegium.trace import Trace

__all__ = ["Hobbit", "unimportance"]


@method("hobbit", kind="precision", paper="HOBBIT (2024)", arxiv="2411.01433")
@dataclass(frozen=True)
class Hobbit(PrecisionSettings):
    """Two thresholds on the unimportance; ``t1 = t2 = 1`` is the high copy for all.

    Attributes:
        t1, t2: T1 and T2, 0 <= T1 <= T2 <= 1. The defaults are the paper's, for two experts a token; with more of them
            `of_trace` finds some.
        low: bits of the low copy; None is the least exact there is. The high copy is the most exact.
        deterministic: an expert whose high copy is in memory follows the thresholds as well, so that what comes out
            does not depend on what was in memory. Else it is served from there.
    """

    t1: float = 0.6
    t2: float = 0.9
    low: int | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.t1 <= self.t2 <= 1:
            raise ConfigError(f"thresholds must be 0 <= t1 <= t2 <= 1, not {self.t1} and {self.t2}")

    @classmethod
    def of_trace(
        cls,
        trace: Trace,
        shares: Sequence[float] = (0.67, 0.30),
        *,
        low: int | None = None,
        deterministic: bool = False,
    ) -> Hobbit:
        """Thresholds that give the wanted shares of assignments over all layers of a trace.

        Args:
            shares: of the high and of the low copy; what is left is left out.

        Raises:
            ConfigError: the shares are no shares.
            TraceError: the trace cannot be read, or a layer of it routes several times in a forward.
        """
        trace.meta.need_one_routing("hobbit")
        if len(shares) != 2 or min(shares) < 0 or sum(shares) > 1 + 1e-9:
            raise ConfigError(f"shares of the high and the low copy must be at least 0 and at most 1 in all: {shares}")
        found = []
        for entry in trace.meta.layers:
            used = trace.experts(entry.layer) < entry.num_experts
            found.append(unimportance(trace.weights(entry.layer), used)[used])
        scores = np.concatenate(found) if found else np.zeros(0)
        if not len(scores):
            return cls(1.0, 1.0, low, deterministic)
        t1, t2 = np.quantile(scores, [shares[0], min(shares[0] + shares[1], 1.0)], method="inverted_cdf")
        return cls(float(t1), float(t2), low, deterministic)

    def build(self, geometry: Geometry, bits: tuple[int, ...]) -> PrecisionPolicy:
        low = bits[-1] if self.low is None else self.low
        if self.t1 >= 1:
            return Fixed().build(geometry, bits)
        if self.t1 < self.t2 and low not in bits[1:]:
            raise ConfigError(
                f"hobbit needs a copy of {'fewer' if self.low is None else self.low} bits beside that of {bits[0]} "
                f"bits; there are copies of {', '.join(map(str, bits))} bits. Pack the model with two, or set t1=1"
            )
        return _Hobbit(geometry, (bits[0], low) if self.t1 < self.t2 else bits[:1], self)


class _Hobbit(PrecisionPolicy):
    def __init__(self, geometry: Geometry, bits: tuple[int, ...], settings: Hobbit) -> None:
        super().__init__(geometry, bits)
        self._settings = settings

    def choose(self, choice: Choice) -> Array:
        high, low = self.bits[0], self.bits[-1]
        chosen = np.full(choice.experts.shape, high, np.uint8)
        if not choice.decode:
            return chosen
        E = self.geometry.experts[choice.layer]
        used = choice.experts < E
        s = unimportance(choice.weights, used)
        chosen[s > self._settings.t1] = low
        chosen[s > self._settings.t2] = SKIP
        if not self._settings.deterministic:
            there = np.append(choice.resident, False)
            chosen[there[np.minimum(choice.experts, E)]] = high
        return chosen


def unimportance(weights: Array, used: Array) -> Array:
    """``[N, K]`` float64 s, 0 to 1, of ``weights [N, K]``; 0 in unused slots and where all weights are 0."""
    w = np.where(used, weights, 0).astype(np.float64)
    order = np.argsort(-w, axis=1, kind="stable")
    ranked = np.take_along_axis(w, order, 1)
    total = ranked.sum(1, keepdims=True)
    before = np.cumsum(ranked, 1) - ranked
    # rounding must not carry the last of many above 1: T1 = 1 is every expert
    ranked_s = np.clip(np.divide(before, total, out=np.zeros_like(before), where=total > 0), 0, 1)
    s = np.empty_like(ranked_s)
    np.put_along_axis(s, order, ranked_s, 1)
    return np.where(used, s, 0.0)
