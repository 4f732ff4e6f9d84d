"""MoE-Infinity: what this request has used, what a like one used before it, and which layer comes soon.

A request's activation matrix (EAM) counts the tokens that used each expert. A collection keeps those of past requests;
once a pass the one most like the current request is looked up, by the mean cosine of their rows. An expert is worth

    uses in all  x  (1 - layers until its layer runs / (L + 1))  x  its share of its layer's row

where the row is the current request's, plus that of the like one so that the first tokens have something to go by. The
least leaves. The published code replaces the least-used matrix of a full collection; so does this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.policies.base import CachePolicy, PolicySettings, Scope, ScoredPolicy, Use, quotas_of

__all__ = ["MoEInfinity"]


@method("moe_infinity", kind="cache", paper="MoE-Infinity (2024)", arxiv="2401.14361")
@dataclass(frozen=True)
class MoEInfinity(PolicySettings):
    """Activation matrices.

    Attributes:
        past: matrices of past requests that are kept.
        scope: "global": one pool, where the layer term matters; "layer": each layer has an even share of the slots.
    """

    past: int = 64
    scope: Scope = "global"

    def build(self, geometry: Geometry, capacity: int) -> CachePolicy:
        if self.past < 0:
            raise ConfigError(f"moe_infinity: past must be at least 0 matrices, not {self.past}")
        return _MoEInfinity(geometry, capacity, quotas_of(self.scope, geometry, capacity), self.past)


class _MoEInfinity(ScoredPolicy):
    """Matrices are vectors ``[total]``, a row being the keys of a layer; past ones have rows of length 1."""

    def __init__(self, geometry: Geometry, capacity: int, quotas: Array | None, past: int) -> None:
        super().__init__(geometry, capacity, quotas)
        self._room = past
        self._past = np.zeros((past, geometry.total))
        self._looked_up = np.zeros(past, np.int64)
        self._stored = 0
        self._current = np.zeros(geometry.total)
        self._like = np.zeros(geometry.total)
        self._uses = np.zeros(geometry.total)
        self._now = 0

    def begin(self) -> None:
        if self._room and self._current.any():
            if self._stored < self._room:
                at, self._stored = self._stored, self._stored + 1
            else:
                at = int(self._looked_up.argmin())
            self._past[at] = self._scaled(self._current, 2)
            self._looked_up[at] = 0
        self._current[:] = self._like[:] = 0

    def used(self, use: Use) -> None:
        super().used(use)
        keys = self.geometry.offsets[use.layer] + use.experts
        self._current[keys] += use.counts
        self._uses[keys] += use.counts
        rows = self.geometry.keys(use.layer)
        row = self._current[rows] + self._like[rows]
        self.score[rows] = self._uses[rows] * row / row.sum()
        self._now = (use.layer + 1) % self.geometry.num_layers
        if self._now == 0 and self._stored:
            self._look_up()

    def _look_up(self) -> None:
        alike = self._past[: self._stored] @ self._scaled(self._current, 2)
        nearest = int(alike.argmax())
        self._looked_up[nearest] += 1
        self._like = self._scaled(self._past[nearest], 1)
        rows = self._current + self._like
        self.score = self._uses * self._scaled(rows, 1)

    def _scaled(self, matrix: Array, order: int) -> Array:
        """Each row divided by its sum (order 1) or its length (order 2)."""
        size = np.add.reduceat(matrix**order, self.geometry.offsets[:-1]) ** (1 / order)
        return matrix / np.where(size > 0, size, 1)[self.geometry.layer_of]

    def worth(self, candidates: Array, incoming: int) -> Array:
        L = self.geometry.num_layers
        ahead = (self.geometry.layer_of[candidates] - self._now) % L
        return self.score[candidates] * (1 - ahead / (L + 1))
