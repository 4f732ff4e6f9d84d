"""How evenly the experts of each layer are used.

Legend: N tokens, L traced layers, E experts of a layer, B blocks of documents, n_e assignments of expert e.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from collegium.errors import ConfigError
from collegium.measure.estimate import Estimate, bootstrap
from collegium.measure.kernels import balance, count_by, each_layer
from collegium.measure.metric import metric
from collegium.measure.tokens import read_tokens
from collegium.trace import Trace
from collegium.trace.schema import PHASES

if TYPE_CHECKING:
    from collegium.measure.statistics import Statistics

__all__ = ["Load", "load", "load_of_statistics"]

Array = np.ndarray[Any, np.dtype[Any]]

COLD = 0.1
"""Of an even share; an expert below is called cold."""


@dataclass(frozen=True, eq=False)
class Load:
    """Use of one layer's experts by all tokens, or by those of one domain or phase.

    Numbers are of assignments that were carried out; what a capacity limit dropped is in `dropped` alone. Without any
    assignment (an empty domain) shares are 0 and the estimates NaN. Of a single document, or of counts that know no
    documents, the estimates have no interval.

    Attributes:
        layer: index of the decoder layer.
        group: name of the domain or phase; None for all tokens.
        counts: ``[E]`` assignments n_e.
        dropped: ``[E]`` assignments that a capacity limit dropped; None if the trace does not record them.
        share: ``[E]`` fraction of the assignments; sums to 1.
        max_violation: MaxVio, ``max_e n_e / mean_e n_e - 1``; 0 at perfect balance, E - 1 when one expert gets all.
        cv: coefficient of variation of n_e; 0 at perfect balance.
        entropy: of `share`, in bits; log2(E) at perfect balance.
        dead: ids of experts without a single assignment.
        cold: ids of experts below a tenth of an even share, dead ones excluded.
        requested_max_violation: MaxVio before drops; None if the trace does not record them.
    """

    layer: int
    group: str | None
    counts: Array
    dropped: Array | None
    share: Array
    max_violation: Estimate
    cv: Estimate
    entropy: Estimate
    dead: tuple[int, ...]
    cold: tuple[int, ...]
    requested_max_violation: float | None = None

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row."""
        return {
            "layer": self.layer,
            **({} if self.group is None else {"group": self.group}),
            "MaxVio": self.max_violation,
            **({} if self.dropped is None else {"MaxVio before drops": self.requested_max_violation}),
            "CV": self.cv,
            "entropy (bits)": self.entropy,
            "of at most (bits)": float(np.log2(len(self.share))),
            "dead experts": len(self.dead),
            "cold experts": len(self.cold),
        }


@metric(
    "load",
    question="How evenly are the experts used?",
    paper="Auxiliary-Loss-Free Load Balancing (2024)",
    arxiv="2408.15664",
    iterated=True,
)
def load(trace: Trace, by: Literal["domain", "phase"] | None = None) -> list[Load]:
    """The load of every traced layer, in order.

    Args:
        trace: any.
        by: measure the tokens of each domain or phase apart; there is then one `Load` for each layer and group,
            groups in the order of ``trace.groups(by)``.

    Raises:
        ConfigError: `by` is something else.
        TraceError: the trace is empty.
    """
    if by not in (None, "domain", "phase"):
        raise ConfigError(f"load by {by!r}: it can be measured by domain, by phase, or of all tokens (None)")
    tokens = read_tokens(trace)
    B = tokens.num_blocks
    names: list[str | None] = [None] if by is None else list(trace.meta.domains if by == "domain" else PHASES)
    code = tokens.block.astype(np.int32)
    if by is not None:
        code += B * getattr(tokens, by).astype(np.int32)
    dropped = None
    if trace.meta.has("dropped"):
        dropped = trace.dropped_counts(by=by).reshape(len(names), len(trace.layers), -1)
    place = {layer: at for at, layer in enumerate(trace.layers)}

    def one(layer: int, E: int, experts: Array) -> list[Load]:
        counts = count_by(experts, code, len(names) * B, E).reshape(len(names), B, E)
        return [
            _load(layer, name, counts[group], None if dropped is None else dropped[group, place[layer], :E])
            for group, name in enumerate(names)
        ]

    return [found for layer in each_layer(trace, tokens, one) for found in layer]


def load_of_statistics(statistics: Statistics) -> list[Load]:
    """The load of every layer from the counts ``n`` of `statistics`, without intervals: counts know no documents.

    Raises:
        ConfigError: there are no such counts.
    """
    return [_load(layer, None, statistics.get(layer, "n").numpy()[None], None) for layer in statistics.layers]


def _load(layer: int, group: str | None, counts_BE: Array, dropped: Array | None) -> Load:
    counts = counts_BE.sum(0)
    E, total = len(counts), int(counts.sum())
    share = counts / max(total, 1)
    violation, cv, entropy = [Estimate(np.nan, np.nan, np.nan)] * 3
    if total:
        most = (E - 1, float(np.sqrt(E - 1)), float(np.log2(E)))
        violation, cv, entropy = bootstrap(counts_BE[counts_BE.any(1)], balance, bounds=(0, most))
    requested = None
    if dropped is not None:
        requested = float(balance(counts + dropped)[0]) if total + dropped.sum() else np.nan
    return Load(
        layer=layer,
        group=group,
        counts=counts,
        dropped=dropped,
        share=share,
        max_violation=violation,
        cv=cv,
        entropy=entropy,
        dead=tuple(np.flatnonzero(counts == 0).tolist()),
        cold=tuple(np.flatnonzero((share > 0) & (share < COLD / E)).tolist()),
        requested_max_violation=requested,
    )
