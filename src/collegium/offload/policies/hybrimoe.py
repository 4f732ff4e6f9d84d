"""MRS (minus recent score): experts whose router probability was high lately stay, even if they narrowly lost.

Of each step the P largest probabilities of a layer are kept and the others set to zero, and the score follows that
vector as a moving average: ``S <- a * TopP(p) + (1 - a) * S``. The least score leaves.

Where no probabilities are to be had (a trace without logits), the combine weights of the chosen experts take their
place, divided by the number of tokens: near misses then earn nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.policies.base import CachePolicy, Need, PolicySettings, Scope, ScoredPolicy, Use, quotas_of

__all__ = ["HybriMoE"]


@method("hybrimoe", kind="cache", paper="HybriMoE (2025)", arxiv="2504.05897")
@dataclass(frozen=True)
class HybriMoE(PolicySettings):
    """Minus recent score.

    Attributes:
        a: weight of the newest step, above 0 and at most 1.
        p: P as a multiple of the layer's K.
        scope: "layer": each layer has an even share of the slots; "global": one pool.
    """

    a: float = 0.5
    p: float = 2.0
    scope: Scope = "layer"

    def build(self, geometry: Geometry, capacity: int) -> CachePolicy:
        if not 0 < self.a <= 1 or not self.p >= 1:
            raise ConfigError(f"hybrimoe: a must be in (0, 1] and p at least 1, not a={self.a}, p={self.p}")
        return _MRS(geometry, capacity, quotas_of(self.scope, geometry, capacity), self.a, self.p)


class _MRS(ScoredPolicy):
    needs: ClassVar[frozenset[Need]] = frozenset({"probabilities"})

    def __init__(self, geometry: Geometry, capacity: int, quotas: Array | None, a: float, p: float) -> None:
        super().__init__(geometry, capacity, quotas)
        self._a = a
        self._keep = [min(E, round(p * K)) for E, K in zip(geometry.experts, geometry.top_k, strict=True)]

    def used(self, use: Use) -> None:
        super().used(use)
        score = self.score[self.geometry.keys(use.layer)]
        score *= 1 - self._a
        if use.probabilities is None:
            score[use.experts] += self._a * use.weights / max(use.tokens, 1)
        else:
            P = self._keep[use.layer]
            top = np.argsort(-use.probabilities, kind="stable")[:P]
            score[top] += self._a * use.probabilities[top]
