"""Truncated singular value decompositions of each matrix of an expert, plain and weighted by what goes into it.

Legend: E experts, d model width, f expert width, m rows and n columns of a matrix, r its rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from collegium.catalog import method
from collegium.compress.factor.parts import assemble, check_settings, rank_of, truncate
from collegium.compress.matrices import LayerExperts
from collegium.compress.plan_layer import LayerPlan
from collegium.errors import ConfigError
from collegium.experts.loose import LooseExpert, LooseMatrix
from collegium.measure.statistics import Statistics

__all__ = ["Svd", "WhitenedSvd"]


@method("svd", kind="factor", paper="MC-SMoE (2023), its low-rank half", arxiv="2310.01334")
@dataclass(frozen=True)
class Svd:
    """Each matrix becomes ``A B``, the nearest of its rank.

    Attributes:
        share: of a matrix's parameters that A and B have together.
        rank: r of every matrix, in place of `share`; what is more than a matrix can have is not taken.
    """

    share: float = 0.5
    rank: int | None = None

    name: ClassVar[str] = "svd"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_settings(self.share, self.rank)

    def size(self, m: int, n: int) -> int:
        return rank_of(m, n, self.share, self.rank) * (m + n)

    def factor(self, layer: LayerPlan, experts: LayerExperts, statistics: Statistics | None) -> Iterator[LooseExpert]:
        def make(name: str, weight: Tensor, bias: Tensor | None) -> LooseMatrix:
            A, B = truncate(weight, rank_of(weight.shape[0], weight.shape[1], self.share, self.rank))
            return LooseMatrix(A=A, B=B, bias=bias)

        return (assemble(experts.read(e), make) for e in layer.keep)


@method("whitened_svd", kind="factor", paper="Sub-MoE (2025), its intra-expert compression", arxiv="2506.23266")
@dataclass(frozen=True)
class WhitenedSvd:
    """Each matrix becomes ``A B``, the one of its rank that changes its outputs least on the calibration data.

    Inputs of gate and up are the block's (statistic ``c_in [d, d]``, over all tokens: sharing one moment keeps the
    statistics small); inputs of down are the expert's own hidden values, taken as uncorrelated (``h_sq [E, f]``). An
    expert that no token reached is truncated in the plain norm.

    Attributes:
        share, rank: as of `Svd`.
    """

    share: float = 0.5
    rank: int | None = None

    name: ClassVar[str] = "whitened_svd"
    needs: ClassVar[tuple[str, ...]] = ("c_in", "h_sq")

    def __post_init__(self) -> None:
        check_settings(self.share, self.rank)

    def size(self, m: int, n: int) -> int:
        return rank_of(m, n, self.share, self.rank) * (m + n)

    def factor(self, layer: LayerPlan, experts: LayerExperts, statistics: Statistics | None) -> Iterator[LooseExpert]:
        if statistics is None:
            raise ConfigError(f"factor {self.name!r} reads {', '.join(self.needs)}; name the statistics")
        inputs, hidden = statistics.get(layer.layer, "c_in"), statistics.get(layer.layer, "h_sq")

        def factored(e: int) -> LooseExpert:
            def make(name: str, weight: Tensor, bias: Tensor | None) -> LooseMatrix:
                moment = hidden[e] if name == "down" else inputs
                A, B = truncate(weight, rank_of(weight.shape[0], weight.shape[1], self.share, self.rank), moment)
                return LooseMatrix(A=A, B=B, bias=bias)

            return assemble(experts.read(e), make)

        return (factored(e) for e in layer.keep)
