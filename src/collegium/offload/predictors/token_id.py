"""Token id: the experts that a token's id used before. It knows all layers as soon as the token is known.

Legend: T tokens of a pass, E experts of a layer, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from collegium.catalog import method
from collegium.offload.geometry import Array, Geometry
from collegium.offload.predictors.base import Moment, Prediction, Predictor
from collegium.offload.predictors.rows import Fitted, Rows
from collegium.offload.predictors.tables import CountTable, shares

__all__ = ["TokenId"]


@method("token_id", kind="predictor", paper="common; routing follows ids: OpenMoE (2024)", arxiv="2402.01739")
@dataclass(frozen=True)
class TokenId(Fitted):
    """A table from token id to experts for each layer, backed off to their frequency."""

    def fit(self, geometry: Geometry, rows: Rows) -> Predictor:
        return _TokenId(geometry, rows)


class _TokenId(Predictor):
    def __init__(self, geometry: Geometry, rows: Rows) -> None:
        super().__init__(geometry)
        self.horizon = geometry.num_layers
        pairs = list(zip(rows.experts, geometry.experts, strict=True))
        self._shares = [shares(used, E) for used, E in pairs]
        self._tables = [CountTable(rows.tokens, used, E) for used, E in pairs]

    def predict(self, moment: Moment) -> list[Prediction]:
        return [Prediction(m, self._scores(m, moment.tokens)) for m in range(moment.layer + 1, len(self._tables))]

    def _scores(self, layer: int, tokens: Array) -> Array:
        return self._tables[layer].rates(tokens, self._shares[layer]).sum(0)
