"""Low rank and structured sparsity: ``W = A B + S`` with a few whole rows of S.

Legend: m rows and n columns of a matrix, r its rank, s rows kept.
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

__all__ = ["McSmoe"]


@method("mc_smoe", kind="factor", paper="MC-SMoE (2023), its compressing half (LoSparse)", arxiv="2310.01334")
@dataclass(frozen=True)
class McSmoe:
    """Each matrix becomes ``A B + S``: A B of a truncated singular value decomposition, S the longest rows of
    ``W - A B``, the others zero.

    The paper prunes S while it fine-tunes, by a running mean of ``|w * grad|`` and on a cubic schedule from all rows to
    the final share. This is the one shot before that: without gradients the length of a row stands for its importance,
    which is inferred, not the paper's.

    Attributes:
        share: of a matrix's parameters that A and B have together.
        rank: r of every matrix, in place of `share`.
        sparse: share of the rows of S that are kept; the paper ends at 0.1.
    """

    share: float = 0.4
    rank: int | None = None
    sparse: float = 0.1

    name: ClassVar[str] = "mc_smoe"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_settings(self.share, self.rank)
        if not 0 <= self.sparse <= 1:
            raise ConfigError(f"sparse is a share of the rows, 0 to 1, not {self.sparse}")

    def _rows(self, m: int) -> int:
        return round(self.sparse * m)

    def size(self, m: int, n: int) -> int:
        return rank_of(m, n, self.share, self.rank) * (m + n) + self._rows(m) * n

    def factor(self, layer: LayerPlan, experts: LayerExperts, statistics: Statistics | None) -> Iterator[LooseExpert]:
        def make(name: str, weight: Tensor, bias: Tensor | None) -> LooseMatrix:
            A, B = truncate(weight, rank_of(weight.shape[0], weight.shape[1], self.share, self.rank))
            rest = weight - A @ B
            count = self._rows(len(weight))
            if count == 0:
                return LooseMatrix(A=A, B=B, bias=bias)
            rows = rest.norm(dim=1).topk(count).indices.sort().values
            return LooseMatrix(A=A, B=B, S=rest[rows].clone(), rows=rows, bias=bias)

        return (assemble(experts.read(e), make) for e in layer.keep)
