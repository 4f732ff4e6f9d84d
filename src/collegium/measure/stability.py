"""How far the routing of the same text differs between two traces, as a rule of two checkpoints of one model.

Legend: N tokens, E experts of a layer, K slots, V token ids, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.errors import TraceError
from collegium.jit import njit
from collegium.measure.estimate import MAX_BLOCKS, Estimate
from collegium.measure.information import means
from collegium.measure.metric import metric
from collegium.measure.tokens import Tokens, read_tokens
from collegium.rng import seed_of
from collegium.trace import Trace

__all__ = ["EarlyRouting", "Fluctuation", "early_routing", "routing_fluctuation"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Fluctuation:
    """Change of one layer's routing from one trace to the other.

    Attributes:
        layer: index of the decoder layer.
        changed: share of tokens whose set of experts differs; 0 if the routing is the same.
        overlap: mean over tokens of ``|common experts| / max(|experts|, |other experts|)``.
        entropy, other_entropy: of the load of the layer's experts in either trace, bits.
    """

    layer: int
    changed: Estimate
    overlap: Estimate
    entropy: float
    other_entropy: float

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row."""
        return {
            "layer": self.layer,
            "tokens with other experts": self.changed,
            "experts in common": self.overlap,
            "load entropy, bits": self.entropy,
            "of the other, bits": self.other_entropy,
        }


@metric(
    "fluctuation",
    question="Do the same tokens go to the same experts in both traces?",
    paper="Graph of Tokens (2025)",
    arxiv="2505.00792",
    needs={"other"},
)
def routing_fluctuation(trace: Trace, other: Trace) -> list[Fluctuation]:
    """Routing fluctuation of every traced layer between two traces of the same tokens.

    Tokens are matched by sequence and position; the order in which they were computed does not matter.

    Raises:
        TraceError: the traces differ in their tokens, layers or numbers of experts; the first difference is named.
    """
    tokens, others = _matched(trace, other)
    found = []
    for layer in trace.layers:
        E = trace.meta.layer(layer).num_experts
        here, there = tokens.experts(trace, layer), others.experts(other, layer)
        changed, overlap = means(_compare(here, there, E, tokens.block, tokens.num_blocks), (0, 1))
        found.append(Fluctuation(layer, changed, overlap, _load_entropy(here, E), _load_entropy(there, E)))
    return found


@dataclass(frozen=True, eq=False)
class EarlyRouting:
    """How alike the experts of each token id are in two traces, in one layer.

    Attributes:
        layer: index of the decoder layer.
        overlap: mean over ids of ``sum_e min(p_e, q_e)`` of the id's expert shares in the two traces, 0 to 1.
        similarity: mean over ids of 1 - Jensen-Shannon divergence (bits) of the same shares, 0 to 1.
        control: `similarity` when an id is compared with another id, at random: what experts that are popular with all
            ids give.
        control_overlap: `overlap` of the same.
        ids: how many ids were compared.
    """

    layer: int
    overlap: Estimate
    similarity: Estimate
    control: float
    control_overlap: float
    ids: int

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row."""
        return {
            "layer": self.layer,
            "overlap": self.overlap,
            "of another token": self.control_overlap,
            "similarity": self.similarity,
            "to another token": self.control,
            "token ids": self.ids,
        }


@metric(
    "early-routing",
    question="Does each token id keep its experts from one checkpoint to the other?",
    paper="OpenMoE (2024)",
    arxiv="2402.01739",
    needs={"other"},
    iterated=True,
)
def early_routing(trace: Trace, other: Trace, *, min_hits: int = 20, seed: int = 0) -> list[EarlyRouting]:
    """Early routing learning: expert shares of each token id in an early and a late checkpoint.

    Intervals are over token ids, not over documents, as each number is a mean over ids.

    Args:
        trace, other: two traces of the same tokens.
        min_hits: ids met less often are left out.
        seed: of the control's pairing.

    Raises:
        TraceError: the traces differ in their tokens, layers or numbers of experts; the first difference is named.
    """
    tokens, others = _matched(trace, other)
    _, code, hits = np.unique(tokens.token, return_inverse=True, return_counts=True)
    frequent = hits >= min_hits
    group = np.where(frequent[code], (np.cumsum(frequent) - 1)[code], -1)
    V = int(frequent.sum())
    # a cyclic shift of a random order: no id is its own partner
    order = np.random.default_rng(seed_of("early_routing", seed)).permutation(V)
    partner = np.empty(V, np.int64)
    partner[order] = np.roll(order, 1)
    found = []
    for layer in trace.layers:
        E = trace.meta.layer(layer).num_experts
        p, q = (_shares(t.experts(of, layer), group, V, E) for t, of in ((tokens, trace), (others, other)))
        overlap, similarity = means(_id_sums(p, q), (0, 1))
        control = _id_sums(p, q[partner]).sum(0) if V > 1 else np.full(3, np.nan)
        control /= max(control[-1], 1)
        found.append(EarlyRouting(layer, overlap, similarity, float(control[1]), float(control[0]), V))
    return found


def _matched(trace: Trace, other: Trace) -> tuple[Tokens, Tokens]:
    """Both traces in reading order, once they are known to be of the same tokens."""
    where = f"{trace.folder} and {other.folder}"
    if trace.layers != other.layers:
        raise TraceError(f"{where} cannot be compared: their layers are {trace.layers} and {other.layers}")
    for layer in trace.layers:
        sizes = [of.meta.layer(layer).num_experts for of in (trace, other)]
        if sizes[0] != sizes[1]:
            raise TraceError(f"{where} cannot be compared: layer {layer} has {sizes[0]} and {sizes[1]} experts")
    tokens, others = read_tokens(trace), read_tokens(other)
    if len(tokens) != len(others):
        raise TraceError(
            f"{where} cannot be compared: they hold {len(tokens)} and {len(others)} tokens; trace the same data with "
            "the same settings"
        )
    keys = [_keys(of) for of in (tokens, others)]
    differs = np.flatnonzero((keys[0] != keys[1]).any(1))
    if len(differs):
        first, second = (key[differs[0]] for key in keys)
        raise TraceError(
            f"{where} cannot be compared: in reading order their token {differs[0]} is number {first[2]} at position "
            f"{first[1]} of sequence {first[0]} in one, number {second[2]} at position {second[1]} of sequence "
            f"{second[0]} in the other; trace the same data with the same settings"
        )
    return tokens, others


def _keys(tokens: Tokens) -> Array:
    """``[N, 3]`` number of the sequence among the trace's, position, token id."""
    sequence = np.repeat(np.arange(len(tokens.starts) - 1), np.diff(tokens.starts))
    return np.stack([sequence, tokens.position, tokens.token], 1)


@njit(cache=True, nogil=True)
def _compare(here: Array, there: Array, E: int, block: Array, B: int) -> Array:
    """``[B, 3]`` sums over tokens: whether the sets differ, their overlap, 1."""
    sums = np.zeros((B, 3))
    for n in range(len(here)):
        size, other_size, common = 0, 0, 0
        for t in range(there.shape[1]):
            other_size += there[n, t] < E
        for s in range(here.shape[1]):
            e = here[n, s]
            if e < E:
                size += 1
                for t in range(there.shape[1]):
                    common += there[n, t] == e
        larger = max(size, other_size)
        b = block[n]
        sums[b, 0] += common < larger
        sums[b, 1] += common / larger if larger else 1.0
        sums[b, 2] += 1
    return sums


def _load_entropy(experts: Array, E: int) -> float:
    counts = np.bincount(experts.reshape(-1), minlength=E)[:E]
    return _entropy(counts / max(counts.sum(), 1)).item()


def _entropy(p: Array) -> Array:
    """Of the last axis, bits."""
    return -(p * np.log2(p, out=np.zeros(p.shape), where=p > 0)).sum(-1)


def _shares(experts: Array, group: Array, V: int, E: int) -> Array:
    """``[V, E]`` share of each id's assignments that each expert gets; a row of 0 for an id without any."""
    counts = _group_counts(experts, group, V, E)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


@njit(cache=True, nogil=True)
def _group_counts(experts: Array, group: Array, V: int, E: int) -> Array:
    counts = np.zeros((V, E), np.int64)
    for n in range(len(experts)):
        if group[n] >= 0:
            for s in range(experts.shape[1]):
                e = experts[n, s]
                if e < E:
                    counts[group[n], e] += 1
    return counts


def _id_sums(p: Array, q: Array) -> Array:
    """``[B, 3]`` sums over ids of overlap, similarity and 1; ids without experts in either trace are left out."""
    seen = p.any(1) & q.any(1)
    p, q = p[seen], q[seen]
    overlap = np.minimum(p, q).sum(1)
    similarity = 1 - (_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)
    block = np.arange(len(p)) % MAX_BLOCKS
    columns = [np.bincount(block, values, MAX_BLOCKS) for values in (overlap, similarity, np.ones(len(p)))]
    return np.stack(columns, 1)
