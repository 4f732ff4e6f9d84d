"""Do experts serve particular domains?

Legend: N tokens, D documents, C domains, E experts of a layer, K slots, B blocks of documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.errors import TraceError
from collegium.jit import njit
from collegium.measure.estimate import Estimate
from collegium.measure.information import means, mutual_information, pointwise_information
from collegium.measure.metric import metric
from collegium.measure.tokens import Tokens, read_tokens
from collegium.rng import seed_of
from collegium.trace import Trace

__all__ = ["DomainInformation", "document_domains", "domain_information"]

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
    bits: Estimate
    control: float
    control_high: float
    share: Array
    domains: tuple[str, ...]

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """One table row."""
        return {
            "layer": self.layer,
            "I(domain; expert), bits": self.bits,
            "shuffled, bits": self.control,
            "largest shuffled, bits": self.control_high,
        }


@metric(
    "domains",
    question="Do experts serve particular domains?",
    paper="OpenMoE (2024)",
    arxiv="2402.01739",
    needs={"domains"},
    iterated=True,
)
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
    tokens = read_tokens(trace)
    domain_D = document_domains(tokens)
    domains = len(set(domain_D.tolist()))
    if domains < 2:
        raise TraceError(
            f"{trace.folder}: {tokens.num_documents} documents of {domains} domains; specialisation needs at least two "
            "of each. Trace a corpus with domain labels (a folder whose subfolders are domains)"
        )
    block_D = np.zeros(tokens.num_documents, np.int64)
    block_D[tokens.document] = tokens.block
    C = len(trace.meta.domains)
    rng = np.random.default_rng(seed_of("domain_information", seed))
    relabelled = [rng.permutation(domain_D) for _ in range(shuffles)]
    found = []
    for layer in trace.layers:
        experts, E = tokens.experts(trace, layer), trace.meta.layer(layer).num_experts
        counts_DE = _document_counts(experts, tokens.document, tokens.num_documents, E)
        joint_CE = _joint(counts_DE, domain_D, C)
        control = [mutual_information(_joint(counts_DE, labels, C)) for labels in relabelled]
        bits_D = (counts_DE * pointwise_information(joint_CE)[domain_D]).sum(1)
        sums = [np.bincount(block_D, values, tokens.num_blocks) for values in (bits_D, counts_DE.sum(1))]
        (bits,) = means(np.stack(sums, 1), (0, np.inf))
        found.append(
            DomainInformation(
                layer=layer,
                bits=bits,
                control=float(np.mean(control)),
                control_high=float(np.max(control)),
                share=joint_CE / np.maximum(joint_CE.sum(1, keepdims=True), 1),
                domains=trace.meta.domains,
            )
        )
    return found


def document_domains(tokens: Tokens) -> Array:
    """``[D]`` domain code of each document (that of its first token)."""
    _, first = np.unique(tokens.document, return_index=True)
    return tokens.domain[first].astype(np.int64)


@njit(cache=True, nogil=True)
def _document_counts(experts: Array, document: Array, D: int, E: int) -> Array:
    counts = np.zeros((D, E), np.int64)
    for n in range(len(experts)):
        for s in range(experts.shape[1]):
            e = experts[n, s]
            if e < E:
                counts[document[n], e] += 1
    return counts


def _joint(counts_DE: Array, domain_D: Array, C: int) -> Array:
    """``[C, E]``; a product with the one-hot labels, exact in float64 and much faster than adding rows."""
    return (np.arange(C)[:, None] == domain_D).astype(np.float64) @ counts_DE
