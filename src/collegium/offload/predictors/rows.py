"""What predictors are fitted on: the tokens of some documents of a trace, and the experts of each layer.

Legend: N tokens, S runs of tokens, K slots, L layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.predictors.base import Gates, Predictor, PredictorSettings

if TYPE_CHECKING:
    from collegium.measure.tokens import Tokens
    from collegium.trace import Trace

__all__ = ["Fitted", "Rows"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokens in reading order.

    Attributes:
        tokens: ``[N]`` int64 token ids.
        experts: of each layer ``[N, K]``, ids >= E in unused slots.
        starts: ``[S + 1]`` where each run begins: tokens of one document that follow one another.
    """

    tokens: Array
    experts: tuple[Array, ...]
    starts: Array

    @classmethod
    def of(cls, trace: Trace, keep: Array | None = None, tokens: Tokens | None = None) -> Rows:
        """The tokens of a trace.

        Args:
            keep: ``[N]`` bool in reading order, which of them; whole documents. None for all.
            tokens: of the trace, where they were read before.

        Raises:
            TraceError: the trace is empty.
        """
        if tokens is None:
            from collegium.measure.tokens import read_tokens

            tokens = read_tokens(trace)
        kept = np.arange(len(tokens)) if keep is None else np.flatnonzero(keep)
        sequence = np.searchsorted(tokens.starts, kept, side="right")
        document = tokens.document[kept]
        new = (sequence[1:] != sequence[:-1]) | (document[1:] != document[:-1])
        starts = np.flatnonzero(np.concatenate([[True], new, [True]])) if len(kept) else np.zeros(1, np.int64)
        experts = tuple(tokens.experts(trace, layer)[kept] for layer in trace.layers)
        return cls(tokens=tokens.token[kept].astype(np.int64), experts=experts, starts=starts)

    def __len__(self) -> int:
        return len(self.tokens)

    def runs(self) -> Iterator[slice]:
        """The runs, in order."""
        for first, end in pairwise(self.starts.tolist()):
            yield slice(first, end)


class Fitted(PredictorSettings):
    """Settings of a predictor that is fitted on tokens."""

    def build(self, geometry: Geometry, *, trace: Trace | None = None, gates: Gates | None = None) -> Predictor:
        if trace is None:
            raise ConfigError(f"the predictor {type(self).__name__} is fitted on a trace, and none was given")
        found = Geometry.of_trace(trace.meta)
        if (found.experts, found.layers) != (geometry.experts, geometry.layers):
            raise ConfigError(
                f"{trace.folder} is of layers {found.layers} with {found.experts} experts; the model has layers "
                f"{geometry.layers} with {geometry.experts}. Fit {type(self).__name__} on a trace of this model"
            )
        return self.fit(geometry, Rows.of(trace))

    @abstractmethod
    def fit(self, geometry: Geometry, rows: Rows) -> Predictor:
        """A predictor fitted on these tokens, which may be none."""
