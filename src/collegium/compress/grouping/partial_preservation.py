"""SlimQwen's partial preservation: the best experts stay as they are, the next best take in the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from collegium.catalog import method
from collegium.compress.grouping.parts import Part, assembled, join, logit_cosines, output_cosines, parts
from collegium.compress.grouping.registry import Groups
from collegium.compress.grouping.weights import Shares, Weighted
from collegium.compress.planners.scores import LayerScores
from collegium.errors import ConfigError
from collegium.measure.statistics import Statistics

__all__ = ["PartialPreservation"]

Similarity = Literal["outputs", "logits"]


@method("partial_preservation", kind="grouping", paper="SlimQwen (2026)", arxiv="2605.08738")
@dataclass(frozen=True)
class PartialPreservation(Weighted):
    """Half of the kept experts, the best, stay as they are, and each expert that is not kept joins the most similar of
    the other half. Of an odd number the larger half takes members. Protected experts count among those that stay.

    Attributes:
        similarity: mean cosine of the "outputs", or cosine of the router "logits".
    """

    shares: Shares = "importance"
    similarity: Similarity = "outputs"

    name: ClassVar[str] = "partial_preservation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.similarity not in get_args(Similarity):
            raise ConfigError(f"similarity {self.similarity!r} is none of {', '.join(get_args(Similarity))}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("out_cos", "out_cos_n") if self.similarity == "outputs" else ("z_gram",)

    def group(
        self, scores: LayerScores, keep: tuple[int, ...], statistics: Statistics, protected: frozenset[int], groups: int
    ) -> Groups:
        cosines = output_cosines if self.similarity == "outputs" else logit_cosines
        similarity = cosines(statistics, scores.layer)
        halves = list(_halves(parts(scores, keep, protected, groups)))
        alone = [e for part in halves for e in part.alone]
        return assembled(alone, [join(part, similarity) for part in halves])


def _halves(found: list[Part]) -> Iterator[Part]:
    """The same routing groups, with the best hosts of each among those that stay alone."""
    for part in found:
        more = max(0, (len(part.alone) + len(part.hosts)) // 2 - len(part.alone))
        yield Part((*part.alone, *part.hosts[:more]), part.hosts[more:], part.rest)
