"""Do experts look at the token itself, at where it stands, or at what the text is about?

Legend: N tokens, M of them with ids that are frequent enough, V such ids, E experts of a layer, K slots, C domains,
B blocks of documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.jit import njit
from collegium.measure.estimate import Estimate
from collegium.measure.information import means
from collegium.measure.metric import metric
from collegium.measure.specialisation import document_domains
from collegium.measure.tokens import Tokens, read_tokens
from collegium.rng import seed_of
from collegium.trace import Trace

__all__ = ["TokenInformation", "token_information"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class TokenInformation:
    """How far the token id, the position and the domain tell the expert, in one layer. All in bits over assignments.

    Every number has a control that shuffles what it is about, as few samples of many ids look informative by chance:
    compare a number with its control, never with 0.

    Attributes:
        layer: index of the decoder layer.
        token: I(expert; token id) over the tokens of ids with at least `min_hits` occurrences (0 if there are none).
        token_control: the same with these tokens' ids shuffled.
        position, position_control: I(expert; position) over positions met at least `min_hits` times, and shuffled.
        domain_given_token: I(expert; domain | token id) over the same tokens as `token`: what context adds to the
            token. None where the trace has one domain.
        domain_given_token_control: the same with the domain labels shuffled over documents.
        concentration: mean over ids of the share of an id's tokens that use its most used expert: 1 if every id has
            an expert of its own, at least K / E.
        coverage: share of the tokens that have such ids.
    """

    layer: int
    token: Estimate
    token_control: float
    position: float
    position_control: float
    domain_given_token: float | None
    domain_given_token_control: float | None
    concentration: float
    coverage: float

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row."""
        return {
            "layer": self.layer,
            "I(expert; token), bits": self.token,
            "tokens shuffled": self.token_control,
            "I(expert; position), bits": self.position,
            "positions shuffled": self.position_control,
            "I(expert; domain | token), bits": self.domain_given_token,
            "domains shuffled": self.domain_given_token_control,
            "mean share of a token's favourite": self.concentration,
            "tokens covered": self.coverage,
        }


@dataclass(frozen=True, eq=False)
class _Groups:
    """Tokens by a value they share: ``rows[ends[v] : ends[v + 1]]`` are the M tokens of value v."""

    rows: Array
    ends: Array

    def shuffled(self, rng: np.random.Generator) -> _Groups:
        return _Groups(rng.permutation(self.rows), self.ends)


@metric(
    "tokens",
    question="Do experts look at the token, its position, or its context?",
    paper="OpenMoE (2024)",
    arxiv="2402.01739",
)
def token_information(trace: Trace, *, min_hits: int = 50, seed: int = 0) -> list[TokenInformation]:
    """Context-independent specialisation of every traced layer.

    Args:
        trace: any.
        min_hits: ids and positions met less often are left out.
        seed: of the controls' shuffles.

    Raises:
        TraceError: the trace is empty.
    """
    tokens = read_tokens(trace)
    rng = np.random.default_rng(seed_of("token_information", seed))
    ids, positions = _groups(tokens.token, min_hits), _groups(tokens.position, min_hits)
    pairs = (ids, ids.shuffled(rng)), (positions, positions.shuffled(rng))
    domain_D = document_domains(tokens)
    labels = (tokens.domain, rng.permutation(domain_D)[tokens.document].astype(tokens.domain.dtype))
    C = len(trace.meta.domains) if len(set(domain_D.tolist())) > 1 else 0
    return [_of_layer(trace, layer, tokens, pairs, labels, C) for layer in trace.layers]


def _of_layer(
    trace: Trace,
    layer: int,
    tokens: Tokens,
    pairs: tuple[tuple[_Groups, _Groups], tuple[_Groups, _Groups]],
    labels: tuple[Array, Array],
    C: int,
) -> TokenInformation:
    experts, E = tokens.experts(trace, layer), trace.meta.layer(layer).num_experts
    (ids, other_ids), (positions, other_positions) = pairs

    def look(groups: _Groups, label: Array, C: int) -> tuple[Array, float, float]:
        return _by_group(experts, groups.rows, groups.ends, E, label, C, tokens.block, tokens.num_blocks)

    def bits(groups: _Groups) -> float:
        sums = look(groups, labels[0], 0)[0].sum(0)
        return max(float(sums[0] / max(sums[1], 1)), 0.0)

    sums, favourite, given = look(ids, labels[0], C)
    used = max(float(sums[:, 1].sum()), 1.0)
    return TokenInformation(
        layer=layer,
        token=means(sums, (0, np.inf))[0] if sums[:, 1].any() else Estimate(0.0, np.nan, np.nan),
        token_control=bits(other_ids),
        position=bits(positions),
        position_control=bits(other_positions),
        domain_given_token=max(given / used, 0.0) if C else None,
        domain_given_token_control=max(look(ids, labels[1], C)[2] / used, 0.0) if C else None,
        concentration=favourite / max(len(ids.ends) - 1, 1),
        coverage=len(ids.rows) / len(tokens),
    )


def _groups(values: Array, min_hits: int) -> _Groups:
    _, code, hits = np.unique(values, return_inverse=True, return_counts=True)
    frequent = hits >= min_hits
    order = np.argsort(code, kind="stable")
    return _Groups(order[frequent[code[order]]], np.concatenate([[0], np.cumsum(hits[frequent])]))


@njit(cache=True, nogil=True)
def _by_group(
    experts: Array, rows: Array, ends: Array, E: int, label: Array, C: int, block: Array, B: int
) -> tuple[Array, float, float]:
    """One group of tokens at a time, so that its tables stay in cache.

    Returns:
        ``[B, 2]`` sums over assignments of ``log2 p(group, e) / (p(group) p(e))`` and of 1; the sum over groups of the
        share of its tokens that its most used expert gets; the sum over assignments of the pointwise information
        between expert and label given the group (0 if C is 0).
    """
    total, count, joint = np.zeros(E, np.int64), np.zeros(E, np.int64), np.zeros((C, E), np.int64)
    score = np.zeros(E)
    sums = np.zeros((B, 2))
    favourite, given = 0.0, 0.0
    for n in rows:
        for s in range(experts.shape[1]):
            if experts[n, s] < E:
                total[experts[n, s]] += 1
    everything = total.sum()
    for v in range(len(ends) - 1):
        count[:] = 0
        joint[:] = 0
        for r in range(ends[v], ends[v + 1]):
            for s in range(experts.shape[1]):
                e = experts[rows[r], s]
                if e < E:
                    count[e] += 1
                    if C:
                        joint[label[rows[r]], e] += 1
        used = count.sum()
        favourite += count.max() / (ends[v + 1] - ends[v])
        for e in range(E):
            if count[e]:
                score[e] = np.log2(count[e] * (everything / (used * total[e])))
        for r in range(ends[v], ends[v + 1]):
            bits, slots = 0.0, 0
            for s in range(experts.shape[1]):
                e = experts[rows[r], s]
                if e < E:
                    bits += score[e]
                    slots += 1
            sums[block[rows[r]], 0] += bits
            sums[block[rows[r]], 1] += slots
        for c in range(C):
            within = joint[c].sum()
            for e in range(E):
                if joint[c, e]:
                    given += joint[c, e] * np.log2(joint[c, e] * (used / (within * count[e])))
    return sums, favourite, given
