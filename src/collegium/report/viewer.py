"""What the token viewer needs: a sample of documents with their routing, and the tokens each expert is known for.

Legend: N tokens of the sample, K slots a token, E experts of a layer, V different token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from collegium.measure.kernels import count_by
from collegium.measure.tokens import Tokens, read_tokens
from collegium.trace import Trace

__all__ = ["Tokenizer", "ViewerData", "viewer_data"]

Array = np.ndarray[Any, np.dtype[Any]]

ROUTING_BYTES = 3_000_000
"""Of experts and weights of the sample, before compression."""
DOCUMENT_TOKENS = 400
"""Of a longer document the start is shown."""
DOCUMENTS = 60
KNOWN_FOR = 10
"""Tokens listed for an expert."""
KNOWN_CELLS = 120_000
"""Tokens listed for all experts together; with more experts fewer are listed for each."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True, eq=False)
class ViewerData:
    """Data of the viewer.

    Attributes:
        meta: JSON data: layers, documents, texts of tokens.
        columns: arrays for a packed block.
    """

    meta: dict[str, Any]
    columns: dict[str, Array]


def viewer_data(
    trace: Trace,
    tokenizer: Tokenizer | None = None,
    *,
    budget: int = ROUTING_BYTES,
    say: Callable[[int, int], None] | None = None,
) -> ViewerData:
    """A sample of documents of every domain, and the most characteristic tokens of every expert in the whole trace.

    Args:
        tokenizer: turns ids into text; without one the ids are shown.
        budget: bytes of routing in the sample.
        say: called with (layers done, of how many).
    """
    tokens = read_tokens(trace)
    layers = trace.meta.layers
    spans = _sample(tokens, len(trace.meta.domains), budget // (3 * sum(entry.top_k for entry in layers)))
    keep = np.concatenate([np.arange(first, last) for first, last in spans])
    listed = max(1, min(KNOWN_FOR, KNOWN_CELLS // sum(entry.num_experts for entry in layers)))
    ids, codes = np.unique(tokens.token, return_inverse=True)
    columns: dict[str, Array] = {}
    entries, known_ids = [], []
    for done, entry in enumerate(layers):
        if say:
            say(done, len(layers))
        experts, weights = tokens.experts(trace, entry.layer), tokens.weights(trace, entry.layer)[keep]
        scale = float(np.abs(weights, dtype=np.float32).max(initial=0)) or 1.0
        columns[f"expert_{entry.layer}"] = experts[keep].ravel()
        columns[f"weight_{entry.layer}"] = np.rint(weights.astype(np.float32) / scale * 127).astype(np.int8).ravel()
        known, count, part = _known_for(experts, codes, len(ids), entry.num_experts, listed)
        columns[f"known_count_{entry.layer}"], columns[f"known_part_{entry.layer}"] = count, part
        known_ids.append(known)
        entries.append({"layer": entry.layer, "experts": entry.num_experts, "slots": experts.shape[1], "scale": scale})
    used, place = np.unique(np.concatenate([codes[keep], *known_ids]), return_inverse=True)
    columns["token"], rest = place[: len(keep)], place[len(keep) :]
    for entry, known in zip(layers, known_ids, strict=True):
        columns[f"known_{entry.layer}"], rest = rest[: len(known)], rest[len(known) :]
    columns["position"] = tokens.position[keep]
    documents = [_document(tokens, trace.meta.domains, span) for span in spans]
    meta = {
        "layers": entries,
        "listed": listed,
        "documents": documents,
        "ids": ids[used].tolist(),
        "texts": None if tokenizer is None else _texts(tokenizer, ids[used].tolist()),
        "documents_in_trace": tokens.num_documents,
        "tokens_in_trace": len(tokens),
    }
    return ViewerData(meta, columns)


def _sample(tokens: Tokens, C: int, limit: int) -> list[tuple[int, int]]:
    """``(first, last)`` rows of the documents shown: domains take turns until `limit` tokens are reached."""
    edge = np.flatnonzero(tokens.document[1:] != tokens.document[:-1]) + 1
    cuts = np.union1d(tokens.starts, edge)
    domain = tokens.domain[cuts[:-1]]
    queues = [np.flatnonzero(domain == code) for code in range(C)]
    found: list[tuple[int, int]] = []
    left = max(limit, 1)
    for turn in range(max(map(len, queues))):
        for queue in queues:
            if turn < len(queue) and left > 0 and len(found) < DOCUMENTS:
                first, last = int(cuts[queue[turn]]), int(cuts[queue[turn] + 1])
                last = min(last, first + DOCUMENT_TOKENS, first + left)
                found.append((first, last))
                left -= last - first
    return sorted(found, key=lambda span: (int(tokens.domain[span[0]]), span[0]))


def _document(tokens: Tokens, domains: Sequence[str], span: tuple[int, int]) -> dict[str, Any]:
    first, last = span
    return {
        "document": int(tokens.document[first]),
        "domain": domains[tokens.domain[first]],
        "from": int(tokens.position[first]),
        "length": last - first,
    }


def _known_for(experts: Array, codes: Array, V: int, E: int, listed: int) -> tuple[Array, Array, Array]:
    """``[E * listed]`` codes of the tokens that say most about each expert, how often it got them, and which part of
    their assignments that is (in percent).

    Tokens are ranked by their contribution to the divergence of the expert's tokens from all tokens, so that a word
    that is frequent everywhere comes first nowhere. Empty places have count 0.
    """
    joint = np.ascontiguousarray(count_by(experts, codes, V, E).T)
    of_expert, of_token = joint.sum(1), joint.sum(0)
    total = max(int(of_expert.sum()), 1)
    known = np.zeros((E, listed), np.int64)
    count, part = np.zeros((E, listed), np.int64), np.zeros((E, listed), np.uint8)
    for expert in np.flatnonzero(of_expert):
        seen = np.flatnonzero(joint[expert])
        hits = joint[expert, seen]
        score = hits * np.log2(hits * (total / (of_token[seen] * of_expert[expert].astype(np.float64))))
        top = seen[np.argsort(-score, kind="stable")[:listed]]
        known[expert, : len(top)] = top
        count[expert, : len(top)] = joint[expert, top]
        part[expert, : len(top)] = np.rint(100 * joint[expert, top] / of_token[top])
    return known.ravel(), count.ravel(), part.ravel()


def _texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each id. A word-start mark that decoding a single token would lose is kept as a space."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    texts = []
    for number, piece in zip(ids, pieces, strict=True):
        text = tokenizer.decode([number])
        if piece is not None and piece.startswith("▁") and not text.startswith(" "):
            text = " " + text
        texts.append(text if text else (piece or str(number)))
    return texts
