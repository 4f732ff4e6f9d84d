"""MC-SMoE's groups: experts whose router logits rise and fall together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from collegium.catalog import method
from collegium.compress.grouping.parts import assembled, join, logit_cosines, parts
from collegium.compress.grouping.registry import Groups
from collegium.compress.grouping.weights import Weighted
from collegium.compress.planners.scores import LayerScores
from collegium.measure.statistics import Statistics

__all__ = ["McSmoe"]


@method("mc_smoe", kind="grouping", paper="MC-SMoE (2023)", arxiv="2310.01334")
@dataclass(frozen=True)
class McSmoe(Weighted):
    """Each expert that is not kept joins the kept one whose router logits are most similar, by their cosine.

    The paper keeps the most used experts, which is the importance score "frequency"; its global budget is the planner
    "global_floor".
    """

    name: ClassVar[str] = "mc_smoe"
    needs: ClassVar[tuple[str, ...]] = ("z_gram",)

    def group(
        self, scores: LayerScores, keep: tuple[int, ...], statistics: Statistics, protected: frozenset[int], groups: int
    ) -> Groups:
        # the paper's similarity is (cosine + 1) / 2, which orders pairs as the cosine does
        similarity = logit_cosines(statistics, scores.layer)
        return assembled(protected, (join(part, similarity) for part in parts(scores, keep, protected, groups)))
