"""How well a token's experts can be guessed before its router has run: the ceiling of prefetching.

Legend: N tokens, H held-out tokens, E experts of a layer, K slots, P experts of the previous traced layer, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from collegium.errors import TraceError
from collegium.jit import njit
from collegium.measure.affinity import pair_counts
from collegium.measure.estimate import Estimate
from collegium.measure.information import means
from collegium.measure.metric import metric
from collegium.measure.tokens import Tokens, read_tokens
from collegium.trace import Trace

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PREDICTORS", "Predictability", "predictability"]

Array = np.ndarray[Any, np.dtype[Any]]

PREDICTORS = ("frequency", "previous token", "token id", "previous layer", "gate input")


@dataclass(frozen=True, eq=False)
class Predictability:
    """Recall@K of one layer's experts on held-out documents.

    Each predictor names the layer's K likeliest experts for a token; recall is the share of the token's experts that
    are among them. The predictors, and what they know:

    - ``frequency``: the experts used most.
    - ``previous token``: those of the token before in the sequence, in this layer; filled up by frequency.
    - ``token id``: those used most by this token id; by frequency for an id that was not met before.
    - ``previous layer``: the experts of the token in the previous traced layer; their transition rows are added.
    - ``gate input``: the input of the previous traced layer's router, given to this layer's router (Fate).

    Attributes:
        layer: index of the decoder layer.
        recall: predictor -> recall@K. The first layer has no "previous layer"; "gate input" needs router inputs in the
            trace, and the model.
        even: K / E, the recall of guessing.
        gate_input_norm: "corrected" if the router input was divided by the weight of the norm in front of the previous
            router and multiplied by that of the norm in front of this one; "raw" if no such norms were found; None
            without the "gate input" predictor.
    """

    layer: int
    recall: dict[str, Estimate]
    even: float
    gate_input_norm: Literal["corrected", "raw"] | None

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row; recall@K by predictor."""
        recall = {name: self.recall.get(name) for name in PREDICTORS}
        return {"layer": self.layer, "by chance": self.even, **recall}


@metric(
    "predictability",
    question="How well can experts be guessed ahead, for prefetching?",
    paper="Fate (2025)",
    arxiv="2502.12224",
)
def predictability(trace: Trace, model: nn.Module | None = None) -> list[Predictability]:
    """Recall@K of five predictors in every traced layer. Fitted on half of the documents, judged on the rest.

    Args:
        trace: of at least two documents.
        model: the traced model, for the "gate input" predictor; needs router inputs in the trace.

    Raises:
        TraceError: the trace is empty or of one document, or `model` is not the traced one.
        UnsupportedFamilyError: no router is known for the gates of `model`.
    """
    tokens = read_tokens(trace)
    if tokens.num_documents < 2:
        raise TraceError(
            f"{trace.folder}: all tokens are of one document; predictions are fitted on some documents and judged on "
            "others. Trace a corpus of several documents"
        )
    held = tokens.block % 2 == 1
    recalls = _table_recalls(trace, tokens, held)
    norms: dict[int, Literal["corrected", "raw"]] = {}
    if model is not None and trace.meta.has("gate_input"):
        from collegium.measure.predict_gate import gate_recalls  # needs torch

        for layer, (sums, norm) in gate_recalls(trace, model, tokens, held).items():
            recalls[layer]["gate input"] = means(sums, (0, 1))[0]
            norms[layer] = norm
    return [
        Predictability(layer, recalls[layer], min(entry.top_k / entry.num_experts, 1.0), norms.get(layer))
        for layer, entry in zip(trace.layers, trace.meta.layers, strict=True)
    ]


def _table_recalls(trace: Trace, tokens: Tokens, held: Array) -> dict[int, dict[str, Estimate]]:
    """layer -> predictor -> recall, of the predictors that need no model."""
    rows, ends = _by_id(tokens.token)
    first = np.zeros(len(tokens), np.bool_)
    first[tokens.starts[:-1]] = True
    at, fit = np.flatnonzero(held), np.flatnonzero(~held)
    recalls: dict[int, dict[str, Estimate]] = {}
    before: Array | None = None
    P = 0
    for layer in trace.layers:
        experts = tokens.experts(trace, layer)
        E, K = trace.meta.layer(layer).num_experts, trace.meta.layer(layer).top_k
        used = (experts < E).sum(1)
        counts = np.bincount(experts[fit].reshape(-1), minlength=E)[:E]
        share = (counts / max(counts.sum(), 1)).astype(np.float32)
        popular = np.argsort(-share, kind="stable")
        hits = {
            "frequency": np.isin(experts[at], popular[:K]).sum(1),
            "previous token": _previous_token(experts, at, first, popular, K),
            "token id": _token_id(experts, rows, ends, held, share, K)[at],
        }
        if before is not None:
            transition = pair_counts(before[fit], experts[fit], np.arange(len(fit)), P, E)
            rates = (transition / np.maximum(transition.sum(1, keepdims=True), 1)).astype(np.float32)
            hits["previous layer"] = _previous_layer(before, experts, at, rates, share, K)
        sums = [np.bincount(tokens.block[at], found, tokens.num_blocks) for found in (*hits.values(), used[at])]
        recalls[layer] = dict(zip(hits, means(np.stack(sums, 1), (0, 1)), strict=True))
        before, P = experts, E
    return recalls


def _by_id(token: Array) -> tuple[Array, Array]:
    """``(rows [N], ends [V + 1])``: the tokens of the v-th id are ``rows[ends[v] : ends[v + 1]]``."""
    _, hits = np.unique(token, return_counts=True)
    return np.argsort(token, kind="stable"), np.concatenate([[0], np.cumsum(hits)])


@njit(cache=True, nogil=True)
def _among_best(score: Array, experts: Array, n: int, K: int) -> int:
    """How many of the experts of token n are among the K of the best score; of equals, the lower id comes first."""
    E = len(score)
    found = 0
    for s in range(experts.shape[1]):
        c = np.int32(experts[n, s])
        if c < E:
            # whole loops with 32-bit counters, so that LLVM makes vector code of them: five times as fast
            value, better = score[c], np.int32(0)
            for e in range(E):
                better = np.int32(better + np.int32(score[e] > value))
            if better < K:
                for e in range(E):
                    better = np.int32(better + np.int32((score[e] == value) & (np.int32(e) < c)))
            found += int(better < K)
    return found


@njit(cache=True, nogil=True)
def _previous_token(experts: Array, at: Array, first: Array, popular: Array, K: int) -> Array:
    """``[H]`` hits of the first K experts of the token before, filled up by ``popular [E]``, most used first."""
    hits = np.zeros(len(at), np.int64)
    E = len(popular)
    guessed = np.full(E, -1)
    for h in range(len(at)):
        n, size = at[h], 0
        if not first[n]:
            for s in range(experts.shape[1]):
                e = experts[n - 1, s]
                if e < E and size < K:
                    guessed[e] = n
                    size += 1
        for e in popular:
            if size >= K:
                break
            if guessed[e] != n:
                guessed[e] = n
                size += 1
        for s in range(experts.shape[1]):
            e = experts[n, s]
            if e < E:
                hits[h] += guessed[e] == n
    return hits


@njit(cache=True, nogil=True)
def _token_id(experts: Array, rows: Array, ends: Array, held: Array, share: Array, K: int) -> Array:
    """``[N]`` hits of: uses by the token's id in the fitted half, plus less than 1 by frequency; 0 if not held out."""
    hits = np.zeros(len(held), np.int64)
    E = len(share)
    base = share * np.float32(0.5)
    score = np.empty_like(base)
    for v in range(len(ends) - 1):
        score[:] = base
        for r in range(ends[v], ends[v + 1]):
            if not held[rows[r]]:
                for s in range(experts.shape[1]):
                    e = experts[rows[r], s]
                    if e < E:
                        score[e] += np.float32(1)
        for r in range(ends[v], ends[v + 1]):
            if held[rows[r]]:
                hits[rows[r]] = _among_best(score, experts, rows[r], K)
    return hits


@njit(cache=True, nogil=True)
def _previous_layer(before: Array, experts: Array, at: Array, rates: Array, share: Array, K: int) -> Array:
    """``[H]`` hits of: the sum of ``rates [P, E]`` over the token's experts ``before``; by frequency if it had none."""
    hits = np.zeros(len(at), np.int64)
    P, E = rates.shape
    base = share * np.float32(1e-6)
    score = np.empty_like(base)
    for h in range(len(at)):
        n = at[h]
        score[:] = base
        for s in range(before.shape[1]):
            i = before[n, s]
            if i < P:
                for e in range(E):
                    score[e] += rates[i, e]
        hits[h] = _among_best(score, experts, n, K)
    return hits
