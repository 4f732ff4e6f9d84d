"""REAM's groups: kept experts as centroids, which take in a limited number of those that would be pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from collegium.catalog import method
from collegium.compress.grouping.parts import Part, assembled, join, logit_cosines, output_cosines, parts
from collegium.compress.grouping.registry import Groups
from collegium.compress.grouping.weights import Shares, Weighted
from collegium.compress.planners.scores import LayerScores
from collegium.errors import ConfigError
from collegium.measure.statistics import Statistics

__all__ = ["Ream"]


@method("ream", kind="grouping", paper="REAM (2026)", arxiv="2604.04356")
@dataclass(frozen=True)
class Ream(Weighted):
    """Each expert that is not kept joins the kept one it is most similar to, as long as that has room.

    Similarity is the cosine of the router logits plus the mean cosine of the outputs, our reading of the paper's
    closeness of gate values and of outputs. The most similar pairs go together first.

    Attributes:
        most: members a group may have, the dominant included; None means one more than evenly filled groups would need.
    """

    shares: Shares = "importance"
    most: int | None = None

    name: ClassVar[str] = "ream"
    needs: ClassVar[tuple[str, ...]] = ("z_gram", "out_cos", "out_cos_n")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most is not None and self.most < 2:
            raise ConfigError(f"most is how many members a group may have, at least 2, not {self.most}")

    def group(
        self, scores: LayerScores, keep: tuple[int, ...], statistics: Statistics, protected: frozenset[int], groups: int
    ) -> Groups:
        similarity = logit_cosines(statistics, scores.layer) + output_cosines(statistics, scores.layer)
        found = parts(scores, keep, protected, groups)
        return assembled(protected, [join(part, similarity, self._room(part, scores.layer)) for part in found])

    def _room(self, part: Part, layer: int) -> int:
        """How many may join one host."""
        if not part.hosts:
            return 0
        fewest = -(-len(part.rest) // len(part.hosts))
        if self.most is None:
            return fewest + 1
        if self.most - 1 < fewest:
            raise ConfigError(
                f"layer {layer}: groups of at most {self.most} have no room for all experts; {len(part.rest)} join "
                f"{len(part.hosts)}, so set most to {fewest + 1} or more"
            )
        return self.most - 1
