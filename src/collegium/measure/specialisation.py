"""Do experts serve particular domains?

Legend: D documents, C domains, E experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.errors import TraceError
from collegium.rng import seed_of
from collegium.trace import Trace

__all__ = ["DomainInformation", "domain_information"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class DomainInformation:
    """Mutual information between the domain of a token and the expert it is sent to, in one layer.

    Attributes:
        layer: index of the decoder layer.
        bits: I(domain; expert) over assignments; 0 when experts ignore the domain, at most log2(min(C, E)).
        control: the same after giving the documents' domain labels to one another, mean over the shuffles: what
            documents that are merely unlike one another would show.
        control_high: the largest of the shuffles.
        share: ``[C, E]`` the part of each domain's assignments that each expert gets; rows sum to 1 (0 if empty).
        domains: names of the rows.
    """

    layer: int
    bits: float
    control: float
    control_high: float
    share: Array
    domains: tuple[str, ...]


def domain_information(trace: Trace, *, shuffles: int = 20, seed: int = 0) -> list[DomainInformation]:
    """I(domain; expert) of every traced layer with a shuffled control.

    Labels are shuffled over documents, not over tokens: tokens of one document share its topic whatever its label, and
    a control that ignores this is too easy to beat.

    Args:
        trace: holds at least two domains and two documents.
        shuffles: random relabellings for the control.
        seed: of the relabellings.

    Raises:
        TraceError: one domain or one document only, so the question has no answer.
    """
    documents, domain_D = _document_domains(trace)
    domains = len(set(domain_D.tolist()))
    if domains < 2:
        raise TraceError(
            f"{trace.folder}: {len(documents)} documents of {domains} domains; specialisation needs at least two of "
            "each. Trace a corpus with domain labels (a folder whose subfolders are domains)"
        )
    C = len(trace.meta.domains)
    rng = np.random.default_rng(seed_of("domain_information", seed))
    relabelled = [rng.permutation(domain_D) for _ in range(shuffles)]
    found = []
    for layer in trace.layers:
        counts_DE = trace.counts(layer, by="document")
        joint_CE = _joint(counts_DE, domain_D, C)
        control = [_mutual_information(_joint(counts_DE, labels, C)) for labels in relabelled]
        found.append(
            DomainInformation(
                layer=layer,
                bits=_mutual_information(joint_CE),
                control=float(np.mean(control)),
                control_high=float(np.max(control)),
                share=joint_CE / np.maximum(joint_CE.sum(1, keepdims=True), 1),
                domains=trace.meta.domains,
            )
        )
    return found


def _document_domains(trace: Trace) -> tuple[Array, Array]:
    """``(document ids [D], their domain codes [D])``, ids ascending as in ``trace.counts(by="document")``."""
    pairs = [
        np.unique(np.stack([part.column("document").astype(np.int64), part.column("domain")]), axis=1)
        for part in trace.iter_parts(["document", "domain"])
    ]
    if not pairs:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    documents, first = np.unique(np.concatenate(pairs, axis=1)[0], return_index=True)
    return documents, np.concatenate(pairs, axis=1)[1][first]


def _joint(counts_DE: Array, domain_D: Array, C: int) -> Array:
    joint = np.zeros((C, counts_DE.shape[1]), np.int64)
    np.add.at(joint, domain_D, counts_DE)
    return joint


def _mutual_information(joint: Array) -> float:
    """Of a table of counts, in bits."""
    p = joint / max(joint.sum(), 1)
    independent = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    seen = p > 0
    return float((p[seen] * np.log2(p[seen] / independent[seen])).sum())
