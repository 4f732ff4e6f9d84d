"""Frequency: the experts used most, whatever the token.

Legend: T tokens of a pass, E experts of a layer, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from collegium.catalog import method
from collegium.offload.geometry import Geometry
from collegium.offload.predictors.base import Moment, Prediction, Predictor
from collegium.offload.predictors.rows import Fitted, Rows
from collegium.offload.predictors.tables import shares

__all__ = ["Frequency"]


@method("frequency", kind="predictor", paper="common; the baseline of EdgeMoE (2023)", arxiv="2308.14352")
@dataclass(frozen=True)
class Frequency(Fitted):
    """Marginal shares, the same for every token and every sequence."""

    def fit(self, geometry: Geometry, rows: Rows) -> Predictor:
        return _Frequency(geometry, rows)


class _Frequency(Predictor):
    def __init__(self, geometry: Geometry, rows: Rows) -> None:
        super().__init__(geometry)
        self.horizon = geometry.num_layers
        self._shares = [shares(used, E) for used, E in zip(rows.experts, geometry.experts, strict=True)]

    def predict(self, moment: Moment) -> list[Prediction]:
        T = len(moment.tokens)
        return [Prediction(m, T * self._shares[m]) for m in range(moment.layer + 1, self.geometry.num_layers)]
