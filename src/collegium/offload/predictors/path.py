"""Path: the experts that tokens used after the same experts in the two layers before (EdgeMoE).

The key is the pair of experts in the first two slots of each of the two previous layers, in no order: with more slots a
key of all experts would hardly ever be met twice. Shares of a key are backed off to those of the previous layer alone,
these to frequency; the paper, of models with one expert a token, does not say.

Legend: T tokens of a pass, N tokens fitted on, K slots, E experts of a layer, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from collegium.catalog import method
from collegium.offload.geometry import Array, Geometry
from collegium.offload.predictors.base import Moment, Prediction, Predictor
from collegium.offload.predictors.rows import Fitted, Rows
from collegium.offload.predictors.tables import CountTable, shares

__all__ = ["Path"]


@method("path", kind="predictor", paper="EdgeMoE (2023)", arxiv="2308.14352")
@dataclass(frozen=True)
class Path(Fitted):
    """Tables from the experts of the previous layers to those of the next one; the first layer's guess is frequency."""

    def fit(self, geometry: Geometry, rows: Rows) -> Predictor:
        return _Path(geometry, rows)


class _Path(Predictor):
    horizon = 1

    def __init__(self, geometry: Geometry, rows: Rows) -> None:
        super().__init__(geometry)
        self._shares = [shares(used, E) for used, E in zip(rows.experts, geometry.experts, strict=True)]
        self._tables: list[list[CountTable]] = []
        for layer, (used, E) in enumerate(zip(rows.experts, geometry.experts, strict=True)):
            keys = self._keys(rows.experts[:layer])
            self._tables.append([CountTable(key, used, E) for key in keys])

    def predict(self, moment: Moment) -> list[Prediction]:
        layer = moment.layer + 1
        if layer >= self.geometry.num_layers:
            return []
        rates = np.broadcast_to(self._shares[layer], (len(moment.tokens), self.geometry.experts[layer]))
        keys = self._keys(moment.experts[:layer])
        for table, key in zip(self._tables[layer], keys, strict=True):
            rates = table.rates(key, rates)
        return [Prediction(layer, rates.sum(0))]

    def _keys(self, experts: Sequence[Array]) -> list[Array]:
        """Keys ``[T]`` of the last layer of `experts`, and of the last two; as many of them as there are layers."""
        found: list[Array] = []
        for back, used in enumerate(reversed(experts[-2:])):
            E = self.geometry.experts[len(experts) - 1 - back]
            pair = np.full((len(used), 2), E, np.int64)
            pair[:, : min(used.shape[1], 2)] = np.minimum(used[:, :2], E)
            pair.sort(1)
            key = pair[:, 0] * (E + 1) + pair[:, 1]
            found.append(key if not found else found[0] * (E + 1) ** 2 + key)
        return found
