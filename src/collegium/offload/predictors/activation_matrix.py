"""Activation matrix: the past request whose use of experts is most like that of this one (MoE-Infinity).

Legend: M stored requests, T tokens of a pass, E experts of a layer, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.predictors.base import Moment, Prediction, Predictor
from collegium.offload.predictors.rows import Fitted, Rows
from collegium.offload.predictors.tables import shares

__all__ = ["ActivationMatrix"]

_FREQUENCY = 1e-3  # what orders the experts that the nearest request never used


@method("activation_matrix", kind="predictor", paper="MoE-Infinity (2024)", arxiv="2401.14361")
@dataclass(frozen=True)
class ActivationMatrix(Fitted):
    """Counts ``[L, E]`` of each past request; the nearest by mean cosine of rows to the counts of the request so far.

    Scores of a layer x, seen from layer l, are those counts as shares, times ``1 - (x - l) / (L + 1)``. Before anything
    was used they are frequencies.

    Attributes:
        capacity: requests that are stored at most; of more, evenly spread ones.
    """

    capacity: int = 256

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ConfigError(f"capacity must be at least 1 request, not {self.capacity}")

    def fit(self, geometry: Geometry, rows: Rows) -> Predictor:
        return _ActivationMatrix(geometry, rows, self.capacity)


class _ActivationMatrix(Predictor):
    def __init__(self, geometry: Geometry, rows: Rows, capacity: int) -> None:
        super().__init__(geometry)
        self.horizon = geometry.num_layers
        runs = list(rows.runs())
        runs = [runs[i] for i in np.unique(np.linspace(0, len(runs) - 1, min(capacity, len(runs))).astype(int))]
        self._frequency, self._stored, self._unit = [], [], []
        for used, E in zip(rows.experts, geometry.experts, strict=True):
            counts = np.stack([_counts(used[run], E) for run in runs]) if runs else np.zeros((0, E), np.float32)
            self._frequency.append(shares(used, E))
            self._stored.append(counts / np.maximum(counts.sum(1, keepdims=True), 1))
            self._unit.append(counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1))
        self.begin()

    def begin(self) -> None:
        L = self.geometry.num_layers
        self._used = [np.zeros(E, np.float32) for E in self.geometry.experts]
        self._cosine = np.zeros((len(self._stored[0]), L), np.float32)

    def predict(self, moment: Moment) -> list[Prediction]:
        T, L, now = len(moment.tokens), self.geometry.num_layers, moment.layer
        if now >= 0:
            self._used[now] += _counts(moment.experts[now], self.geometry.experts[now])
            self._cosine[:, now] = self._unit[now] @ self._used[now] / max(float(np.linalg.norm(self._used[now])), 1.0)
        nearest = int(self._cosine.sum(1).argmax()) if self._cosine.any() else None
        found = []
        for layer in range(now + 1, L):
            share = self._frequency[layer]
            if nearest is not None:
                share = self._stored[layer][nearest] * self.geometry.top_k[layer] + _FREQUENCY * share
            found.append(Prediction(layer, T * share * np.float32(1 - (layer - now) / (L + 1))))
        return found


def _counts(experts: Array, E: int) -> Array:
    """``[E]`` float32 uses in ``experts [T, K]``."""
    return np.bincount(experts.reshape(-1).astype(np.int64), minlength=E)[:E].astype(np.float32)
