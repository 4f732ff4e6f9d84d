"""The tokens of a trace in reading order: sequence by sequence, position by position.

A trace holds rows in the order they were computed, which for generated text is step by step over many sequences.
Anything about neighbouring tokens needs them as they were read and written.

Legend: N tokens, S sequences, D documents, K slots a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from collegium.errors import TraceError
from collegium.measure.estimate import MAX_BLOCKS
from collegium.rng import seed_of
from collegium.trace import Trace

__all__ = ["Tokens", "read_tokens"]

Array = np.ndarray[Any, np.dtype[Any]]

_COLUMNS = ("sequence", "document", "position", "token", "domain", "phase")


@dataclass(frozen=True, eq=False)
class Tokens:
    """All tokens of a trace in reading order; every array but `starts` and `order` is ``[N]``.

    Attributes:
        order: row of the trace of each token, or None where the trace is in reading order already.
        starts: ``[S + 1]`` where each sequence begins; neighbours are never counted across these.
        document: code of the token's document, ``0 .. D-1``.
        domain, phase: indices into ``meta.domains`` and `collegium.trace.schema.PHASES`.
        position, token: as recorded.
        block: which block of whole documents a bootstrap counts the token in, ``0 .. B-1``.
        num_documents, num_blocks: D and B.
    """

    order: Array | None
    starts: Array
    document: Array
    domain: Array
    phase: Array
    position: Array
    token: Array
    block: Array
    num_documents: int
    num_blocks: int

    def __len__(self) -> int:
        return len(self.token)

    def experts(self, trace: Trace, layer: int) -> Array:
        """``[N, K]`` expert ids of `layer` in reading order, C-contiguous; unused slots hold the sentinel E."""
        return self._arrange(trace.experts(layer))

    def weights(self, trace: Trace, layer: int) -> Array:
        """``[N, K]`` float16 combine weights of `layer` in reading order, 0 in unused slots."""
        return self._arrange(trace.weights(layer))

    def recorded_block(self) -> Array:
        """``[N]`` block of each row of the trace, in the order of recording."""
        if self.order is None:
            return self.block
        block = np.empty_like(self.block)
        block[self.order] = self.block
        return block

    def _arrange(self, rows: Array) -> Array:
        return np.ascontiguousarray(rows if self.order is None else rows[self.order])


def read_tokens(trace: Trace) -> Tokens:
    """The tokens of `trace` in reading order. About 30 bytes a token stay in memory.

    Raises:
        TraceError: the trace is empty.
    """
    parts = [[part.column(name) for name in _COLUMNS] for part in trace.iter_parts(_COLUMNS)]
    if not parts or not sum(len(part[0]) for part in parts):
        raise TraceError(f"{trace.folder}: the trace holds no tokens, so there is nothing to measure")
    sequence, document, position, token, domain, phase = (
        np.concatenate(columns) for columns in zip(*parts, strict=True)
    )
    # stable: rows of one position (a rejected draft and what took its place) stay in the order they were computed
    order: Array | None = np.lexsort((position, sequence))
    if order is not None and (order == np.arange(len(order))).all():
        order = None
    if order is not None:
        sequence, document, position, token, domain, phase = (
            column[order] for column in (sequence, document, position, token, domain, phase)
        )
    starts = np.flatnonzero(np.concatenate([[True], sequence[1:] != sequence[:-1], [True]]))
    _, codes = np.unique(document, return_inverse=True)
    D = int(codes.max()) + 1
    block = _blocks(D)
    return Tokens(
        order=order,
        starts=starts,
        document=codes.astype(np.int32),
        domain=domain.astype(np.int16),
        phase=phase.astype(np.uint8),
        position=position,
        token=token,
        block=block[codes],
        num_documents=D,
        num_blocks=min(D, MAX_BLOCKS),
    )


def _blocks(D: int) -> Array:
    """A block for each of D documents, evenly and at random, as neighbouring documents are often of one domain."""
    dealt = np.arange(D) % min(D, MAX_BLOCKS)
    return np.random.default_rng(seed_of("blocks", D)).permutation(dealt).astype(np.uint8)
