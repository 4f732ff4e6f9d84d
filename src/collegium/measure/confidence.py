"""How sure routers are: from the logits of a trace.

Legend: N tokens, E experts of a layer, K slots, B blocks of documents, p probabilities ``[N, E]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.errors import TraceError
from collegium.jit import njit
from collegium.measure.estimate import Estimate
from collegium.measure.information import means
from collegium.measure.metric import metric
from collegium.measure.tokens import read_tokens
from collegium.trace import Trace

__all__ = ["Confidence", "router_confidence"]

Array = np.ndarray[Any, np.dtype[Any]]

Score = Callable[[Array], tuple[Array, Array, Array]]
"""``z [N, E]`` -> ``(p [N, E], sum of p [N], entropy of p / sum [N] in bits)``; `z` may be overwritten."""

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9)
MASSES = (0.5, 0.8, 0.9)
FRAGILE = 0.01
CHANGED = 0.05
"""Part of the combine weight that has to move for a token to count as changed by another k."""


@dataclass(frozen=True, eq=False)
class Confidence:
    """How clear the choices of one layer's router are.

    p is the softmax of the logits, or their sigmoids. Sigmoids do not sum to 1: for everything but the margin they are
    divided by their sum. Intervals are over blocks of documents, and NaN for a single document.

    Attributes:
        layer: index of the decoder layer.
        margin: quantile -> p of the least of a token's experts minus p of the best one that was not chosen. Negative
            where the router looks at more than p (a selection bias, groups of experts, sampling). NaN if no token has
            both.
        top_mass: mean mass of p on the chosen experts.
        entropy: mean entropy of p, bits; log2(E) for a router that knows nothing.
        k_for_mass: share of the mass -> mean number of experts, best first, that reach it.
        changed_by_k: k -> share of tokens that k experts instead of the layer's K would change: more than 5 % of their
            combine weight, renormalised over the k likeliest experts, would move. For about K / 2, K - 1, K + 1, 2 K.
        fragile: share of tokens with a margin under 0.01: a small change of the input, or of the precision, changes
            their experts.
    """

    layer: int
    margin: dict[float, Estimate]
    top_mass: Estimate
    entropy: Estimate
    k_for_mass: dict[float, Estimate]
    changed_by_k: dict[int, Estimate]
    fragile: Estimate

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row."""
        return {
            "layer": self.layer,
            "median margin": self.margin[0.5],
            "margin under 1 %": self.fragile,
            "mass of the chosen": self.top_mass,
            "entropy, bits": self.entropy,
            **{f"experts for {mass:.0%}": k for mass, k in self.k_for_mass.items()},
            **{f"changed by k = {k}": share for k, share in self.changed_by_k.items()},
        }


@metric(
    "confidence",
    question="How sure are the routers?",
    paper="Switch Transformers (2021)",
    arxiv="2101.03961",
    needs={"logits"},
)
def router_confidence(trace: Trace) -> list[Confidence]:
    """Margin, mass and entropy of the routers' probabilities, in every traced layer.

    Probabilities are computed in float32 from the recorded float16 logits, one part of the trace at a time; 4 bytes a
    token and layer stay in memory for the quantiles.

    Raises:
        TraceError: the trace is empty or was recorded without logits, or the score function of a layer is neither
            softmax nor sigmoid.
    """
    if not trace.meta.has("logits"):
        raise TraceError(f"{trace.folder} was recorded without router logits; record it again with --logits")
    scores = {layer: _score(trace, layer) for layer in trace.layers}
    tokens = read_tokens(trace)
    block = tokens.recorded_block()
    other_k = {layer: _other_k(trace, layer) for layer in trace.layers}
    sums = {layer: np.zeros((tokens.num_blocks, len(MASSES) + len(other_k[layer]) + 4)) for layer in trace.layers}
    margins = {layer: np.empty(len(tokens), np.float32) for layer in trace.layers}
    names = [f"{kind}_{layer}" for layer in trace.layers for kind in ("expert", "logits")]
    for part in trace.iter_parts(names):
        rows = slice(part.start, part.start + len(part))
        for layer in trace.layers:
            p, total, entropy = scores[layer](part.logits(layer).astype(np.float32))
            experts = np.ascontiguousarray(part.experts(layer))
            K = min(trace.meta.layer(layer).top_k, p.shape[1])
            least = _add(p, np.sort(p, 1), total, entropy, experts, block[rows], K, other_k[layer], sums[layer])
            best = p.max(1)  # of those not chosen: the others are -1 by now
            margins[layer][rows] = np.where((best < 0) | np.isinf(least), np.float32(np.nan), least - best)
            sums[layer][:, -2] += np.bincount(block[rows], margins[layer][rows] < FRAGILE, tokens.num_blocks)
    return [_confidence(layer, margins[layer], block, other_k[layer], sums[layer]) for layer in trace.layers]


def _other_k(trace: Trace, layer: int) -> Array:
    entry = trace.meta.layer(layer)
    K = entry.top_k
    return np.array(sorted({k for k in (K // 2, K - 1, K + 1, 2 * K) if 1 <= k <= entry.num_experts} - {K}), np.int64)


def _confidence(layer: int, margin: Array, block: Array, other_k: Array, sums: Array) -> Confidence:
    highest = [1, np.inf, *[np.inf] * len(MASSES), *[1] * len(other_k), 1]
    top_mass, entropy, *rest, fragile = means(sums, (0, highest))
    return Confidence(
        layer=layer,
        margin=dict(zip(QUANTILES, _quantiles(margin, block, len(sums)), strict=True)),
        top_mass=top_mass,
        entropy=entropy,
        k_for_mass=dict(zip(MASSES, rest[: len(MASSES)], strict=True)),
        changed_by_k=dict(zip(other_k.tolist(), rest[len(MASSES) :], strict=True)),
        fragile=fragile,
    )


def _quantiles(values: Array, block: Array, B: int) -> list[Estimate]:
    """`QUANTILES` of ``values [N]``, NaN left out, with the intervals of Woodruff (1952).

    The share of values up to a quantile is a mean, whose interval is found by resampling; the values at the ends of
    that interval are the ends for the quantile.
    """
    known = ~np.isnan(values)
    values, block = values[known], block[known]
    if not len(values):
        return [Estimate(np.nan, np.nan, np.nan)] * len(QUANTILES)
    found = np.quantile(values, QUANTILES)
    counts = [np.bincount(block, values <= value, B) for value in found]
    shares = means(np.stack([*counts, np.bincount(block, minlength=B)], 1), (0, 1))
    if np.isnan(shares[0].low):
        return [Estimate(float(value), np.nan, np.nan) for value in found]
    # of values that are equal, the share up to one is larger than the quantile's
    ends = [
        (q + share.low - share.value, q + share.high - share.value) for q, share in zip(QUANTILES, shares, strict=True)
    ]
    lows, highs = np.quantile(values, np.clip(np.transpose(ends), 0, 1))
    return [Estimate(*map(float, number)) for number in zip(found, lows, highs, strict=True)]


def _score(trace: Trace, layer: int) -> Score:
    score = trace.meta.layer(layer).score
    if score not in _SCORES:
        raise TraceError(
            f"{trace.folder}: the score function of layer {layer} is {score!r}; probabilities are known for "
            f"{' and '.join(_SCORES)} only"
        )
    return _SCORES[score]


def _softmax(z: Array) -> tuple[Array, Array, Array]:
    z -= z.max(1, keepdims=True)
    np.maximum(z, -1e4, out=z)  # masked experts: exp is 0 all the same, and 0 * -1e4 is 0
    p = np.exp(z)
    total = p.sum(1)
    p /= total[:, None]
    return p, np.ones_like(total), (np.log(total) - np.einsum("ne,ne->n", p, z)) / np.float32(np.log(2))


def _sigmoid(z: Array) -> tuple[Array, Array, Array]:
    p = 1 / (1 + np.exp(np.minimum(-z, 80)))
    total = p.sum(1)
    return p, total, np.log2(total) - np.einsum("ne,ne->n", p, np.log2(p)) / total


_SCORES: dict[str, Score] = {"softmax": _softmax, "sigmoid": _sigmoid}


@njit(cache=True, nogil=True)
def _add(
    p: Array,
    ascending: Array,
    total: Array,
    entropy: Array,
    experts: Array,
    block: Array,
    K: int,
    other_k: Array,
    sums: Array,
) -> Array:
    """Add one part to ``sums [B, mass of the chosen, entropy, experts for MASSES, tokens changed by other k, fragile
    tokens, tokens]``, but for the fragile ones; chosen p become -1.

    Returns:
        ``[N]`` p of the least of the chosen, infinite where there is none.
    """
    N, E = p.shape
    least = np.full(N, np.inf, np.float32)
    for n in range(N):
        into = sums[block[n]]
        mass = np.float32(0)
        for s in range(experts.shape[1]):
            e = experts[n, s]
            if e < E:
                mass += p[n, e]
                least[n] = min(least[n], p[n, e])
                p[n, e] = -1
        reached, k = np.float32(0), 0
        for q in range(len(MASSES)):
            while k < E and reached < np.float32(MASSES[q]) * total[n]:
                k += 1
                reached += ascending[n, E - k]
            into[2 + q] += k
        # the weights of the fewer experts are those of the more, scaled up: what moves is what the others held
        for i in range(len(other_k)):
            fewer, more = min(K, other_k[i]), max(K, other_k[i])
            beyond = ascending[n, E - more : E - fewer].sum()
            held = ascending[n, E - fewer :].sum()
            into[2 + len(MASSES) + i] += beyond > CHANGED * (held + beyond)
        into[0] += mass / total[n]
        into[1] += entropy[n]
        into[-1] += 1
    return least
