"""Which experts follow one another from layer to layer, and which are chosen together within a layer.

Legend: N tokens, K slots of a layer, E its experts, F experts of the next traced layer, B blocks of documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from collegium.jit import njit
from collegium.measure.estimate import Estimate
from collegium.measure.information import means, mutual_information, pointwise_information
from collegium.measure.metric import metric
from collegium.measure.tokens import Tokens, read_tokens
from collegium.rng import seed_of
from collegium.trace import Trace

__all__ = ["Affinity", "CoActivation", "coactivation", "inter_layer_affinity", "pair_counts"]

Array = np.ndarray[Any, np.dtype[Any]]

STRONGEST = 8
CLEAR = 4.0  # standard deviations of a Poisson count; chance among 10 000 pairs seldom gives more


@dataclass(frozen=True, eq=False)
class Affinity:
    """How far the experts of a token in one layer tell its experts in the next traced layer.

    A token of K experts here and K' there counts as K K' pairs.

    Attributes:
        layer, next_layer: indices of the two decoder layers.
        transition: ``[E, F]`` share of each expert's pairs that go to each expert of the next layer; rows sum to 1
            (0 for an expert without any).
        information: I(expert; next expert) over pairs, bits. With K > 1 it is far below the entropy of the next layer
            even where the next experts are certain, as a pair names only one of K'.
        control: the same after shuffling whole tokens of the next layer: what this many tokens of independent layers
            would show.
        concentration: mean over assignments of the transition mass on the K' likeliest successors of the expert; 1 if
            an expert is always followed by the same ones.
        concentration_control: the same with shuffled tokens.
        even: K' / F, the concentration of even transitions.
    """

    layer: int
    next_layer: int
    transition: Array
    information: Estimate
    control: float
    concentration: Estimate
    concentration_control: float
    even: float

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row."""
        return {
            "layer": self.layer,
            "next": self.next_layer,
            "I(expert; next), bits": self.information,
            "shuffled, bits": self.control,
            "mass on likeliest successors": self.concentration,
            "shuffled": self.concentration_control,
            "even": self.even,
        }


@metric(
    "affinity",
    question="Do the experts of one layer tell those of the next?",
    paper="ExFlow (2024)",
    arxiv="2401.08383",
)
def inter_layer_affinity(trace: Trace, *, seed: int = 0) -> list[Affinity]:
    """Transitions between the experts of adjacent traced layers, one result a pair of layers.

    The paper's models are top-1; for K > 1 every pair of a token's experts in the two layers counts once.

    Args:
        trace: of at least two layers, else the list is empty.
        seed: of the control's shuffle.

    Raises:
        TraceError: the trace is empty.
    """
    tokens = read_tokens(trace)
    found = []
    before: Array | None = None
    for layer, next_layer in pairwise(trace.layers):
        here = tokens.experts(trace, layer) if before is None else before
        there = tokens.experts(trace, next_layer)
        found.append(_affinity(trace, tokens, (layer, next_layer), here, there, seed))
        before = there
    return found


def _affinity(trace: Trace, tokens: Tokens, layers: tuple[int, int], here: Array, there: Array, seed: int) -> Affinity:
    first, second = (trace.meta.layer(layer) for layer in layers)
    E, F, K = first.num_experts, second.num_experts, min(second.top_k, second.num_experts)
    counts = pair_counts(here, there, np.arange(len(tokens)), E, F)
    shuffle = np.random.default_rng(seed_of("affinity", seed, layers[0])).permutation(len(tokens))
    shuffled = pair_counts(here, there, shuffle, E, F)
    transition = _transition(counts)
    sums = _pair_sums(
        here, there, pointwise_information(counts), _likeliest(transition, K), tokens.block, tokens.num_blocks
    )
    information, concentration = means(sums, (0, (np.inf, 1)))
    weight = shuffled.sum(1)
    return Affinity(
        layer=layers[0],
        next_layer=layers[1],
        transition=transition,
        information=information,
        control=mutual_information(shuffled),
        concentration=concentration,
        concentration_control=float(_likeliest(_transition(shuffled), K) @ weight / max(weight.sum(), 1)),
        even=K / F,
    )


def _transition(counts: Array) -> Array:
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def _likeliest(transition: Array, K: int) -> Array:
    """``[E]`` mass of the K largest entries of each row."""
    return np.sort(transition, 1)[:, -K:].sum(1)


@njit(cache=True, nogil=True)
def pair_counts(here: Array, there: Array, partner: Array, E: int, F: int) -> Array:
    """``[E, F]`` int64: in how many tokens n expert i is in ``here[n]`` and expert j in ``there[partner[n]]``."""
    counts = np.zeros((E, F), np.int64)
    for n in range(len(here)):
        m = partner[n]
        for s in range(here.shape[1]):
            i = here[n, s]
            if i < E:
                for t in range(there.shape[1]):
                    j = there[m, t]
                    if j < F:
                        counts[i, j] += 1
    return counts


@njit(cache=True, nogil=True)
def _pair_sums(here: Array, there: Array, score: Array, mass: Array, block: Array, B: int) -> Array:
    """``[B, 3]`` sums over pairs of a token's experts: ``score [E, F]`` of both, ``mass [E]`` of the first, 1."""
    E, F = score.shape
    sums = np.zeros((B, 3))
    for n in range(len(here)):
        bits, held, pairs = 0.0, 0.0, 0
        for s in range(here.shape[1]):
            i = here[n, s]
            if i < E:
                for t in range(there.shape[1]):
                    j = there[n, t]
                    if j < F:
                        bits += score[i, j]
                        held += mass[i]
                        pairs += 1
        b = block[n]
        sums[b, 0] += bits
        sums[b, 1] += held
        sums[b, 2] += pairs
    return sums


@dataclass(frozen=True, eq=False)
class CoActivation:
    """Which experts of one layer are chosen by the same tokens.

    Attributes:
        layer: index of the decoder layer.
        counts: ``[E, E]`` tokens that chose both; symmetric, zero diagonal.
        lift: ``[E, E]`` counts relative to quasi-independence (Goodman, 1968), in which a pair is met in proportion to
            how often either expert is met in pairs at all; 1 where popularity explains the pair, 0 on the diagonal and
            for experts without any partner.
        strongest: ``(i, j, lift)`` with i < j of the pairs that stand out most clearly from chance, by
            ``(counts - expected) / sqrt(expected)``, clearest first, at most 8; empty if none does.
    """

    layer: int
    counts: Array
    lift: Array
    strongest: tuple[tuple[int, int, float], ...]

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row."""
        i, j, lift = self.strongest[0] if self.strongest else (None, None, None)
        return {
            "layer": self.layer,
            "clearest pair": None if lift is None else f"{i} + {j}",
            "tokens with both": None if i is None or j is None else int(self.counts[i, j]),
            "times as many as by popularity": lift,
        }


@metric(
    "coactivation",
    question="Which experts are chosen together?",
    paper="OLMoE (2024)",
    arxiv="2409.02060",
)
def coactivation(trace: Trace) -> list[CoActivation]:
    """Pairs of experts chosen by one token, in every traced layer. A layer with one expert a token has none.

    Raises:
        TraceError: an id is not below E.
    """
    found = []
    for layer in trace.layers:
        counts = _together(np.ascontiguousarray(trace.experts(layer)), trace.meta.layer(layer).num_experts)
        expected = _quasi_independent(counts)
        lift = np.divide(counts, expected, out=np.zeros(counts.shape), where=expected > 0)
        found.append(CoActivation(layer, counts, lift, _strongest(counts, expected, lift)))
    return found


@njit(cache=True, nogil=True)
def _together(experts: Array, E: int) -> Array:
    counts = np.zeros((E, E), np.int64)
    for n in range(len(experts)):
        for s in range(experts.shape[1]):
            i = experts[n, s]
            if i < E:
                for t in range(s):
                    j = experts[n, t]
                    if j < E and j != i:
                        counts[i, j] += 1
    return counts + counts.T


def _quasi_independent(counts: Array) -> Array:
    """``[E, E]`` ``a_i a_j`` off the diagonal, with the row sums of `counts`: found by iterative scaling."""
    rows = counts.sum(1)
    a = rows / np.sqrt(max(rows.sum(), 1))
    for _ in range(200):
        a = a * np.sqrt(rows / np.maximum(a * (a.sum() - a), 1e-300))
    expected = np.outer(a, a)
    np.fill_diagonal(expected, 0)
    return expected


def _strongest(counts: Array, expected: Array, lift: Array) -> tuple[tuple[int, int, float], ...]:
    residual = np.triu(counts - expected, 1) / np.sqrt(np.maximum(expected, 1))
    order = np.argsort(-residual, axis=None, kind="stable")[:STRONGEST]
    pairs = zip(*np.unravel_index(order, residual.shape), strict=True)
    return tuple((int(i), int(j), float(lift[i, j])) for i, j in pairs if residual[i, j] > CLEAR)
