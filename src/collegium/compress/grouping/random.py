"""The baseline of groupings: chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from collegium.catalog import method
from collegium.compress.grouping.parts import assembled, join, parts
from collegium.compress.grouping.registry import Groups
from collegium.compress.grouping.weights import Weighted
from collegium.compress.planners.scores import LayerScores
from collegium.measure.statistics import Statistics
from collegium.rng import generator

__all__ = ["Random"]


@method("random", kind="grouping", paper="MC-SMoE (2023), its random groups", arxiv="2310.01334")
@dataclass(frozen=True)
class Random(Weighted):
    """Each expert that is not kept joins a kept one drawn at random.

    Attributes:
        seed: another seed, other groups.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    needs: ClassVar[tuple[str, ...]] = ()

    def group(
        self, scores: LayerScores, keep: tuple[int, ...], statistics: Statistics, protected: frozenset[int], groups: int
    ) -> Groups:
        E = len(scores.order)
        draws = generator(self.seed, scores.layer, "random grouping")
        similarity = torch.rand(E, E, generator=draws, dtype=torch.float64)
        return assembled(protected, (join(part, similarity) for part in parts(scores, keep, protected, groups)))
