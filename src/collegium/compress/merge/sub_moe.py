"""Sub-MoE's merge: the matrices of a group decomposed together, their right factors averaged.

Legend: g members of a group, O rows and I columns of a matrix, r singular values that are kept, f expert width, d model
width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.compress.matrices import Expert, LayerExperts
from collegium.compress.merge.align import aligned
from collegium.compress.merge.average import by_group, weighted_sum
from collegium.compress.plan_layer import LayerPlan
from collegium.errors import ConfigError
from collegium.measure.statistics import Statistics

__all__ = ["SubMoe", "Union"]

_RIDGE = 1e-5  # of the mean second moment, so that unseen directions count a little


@dataclass(eq=False)
class Union:
    """The singular value decomposition ``[W_1, ..., W_g] = Q S [V_1, ..., V_g]^T`` of matrices side by side, of which
    only Q is needed.

    As ``W_i = Q S V_i^T``, rebuilding from the first r singular values with the weighted mean of the V_i gives
    ``Q_r Q_r^T`` times the weighted mean of the W_i: without truncation it is the plain average. Whitening by a factor
    M of the inputs' second moments, which the paper divides out again after averaging, only changes what Q is of,
    namely W_i M.

    Attributes:
        rows, columns: O, and the sum of the I.
    """

    rows: int
    columns: int
    _beside: list[Tensor] = field(default_factory=list)
    _gram: Tensor | float = 0.0

    def add(self, matrix: Tensor) -> None:
        """One ``[O, I]`` more."""
        matrix = matrix.double()
        if self.columns < self.rows:
            self._beside.append(matrix)
        else:
            self._gram = matrix @ matrix.T + self._gram

    def truncated(self, mean: Tensor, share: float) -> Tensor:
        """``[O, I]`` the average `mean` rebuilt from this share of the singular values, at least one."""
        rank = max(1, round(share * min(self.rows, self.columns)))
        if self._beside:  # by the smaller of the two Gram matrices
            beside = torch.cat(self._beside, 1)
            right = torch.linalg.eigh(beside.T @ beside)[1][:, -rank:]
            left = torch.linalg.qr(beside @ right)[0]
        else:
            assert isinstance(self._gram, Tensor)
            left = torch.linalg.eigh(self._gram)[1][:, -rank:]
        return (left @ (left.T @ mean.double())).float()


@dataclass(frozen=True, eq=False)
class _Moments:
    """What a layer's matrices are multiplied with before they are decomposed.

    Attributes:
        block: ``[d, d]`` a factor of the second moment of the experts' inputs.
        hidden: ``[E, f]`` square roots of the mean squares of the neurons' outputs.
    """

    block: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, statistics: Statistics, layer: int) -> _Moments:
        inputs = statistics.get(layer, "c_in").double()
        inputs = inputs + _RIDGE * inputs.diagonal().mean() * torch.eye(len(inputs), dtype=inputs.dtype)
        hidden = statistics.get(layer, "h_sq").double() / statistics.get(layer, "n").clamp(min=1)[:, None]
        factor, failed = torch.linalg.cholesky_ex(inputs)
        if int(failed):
            raise ConfigError(
                f"statistic c_in of layer {layer} is no second moment: it has negative directions, or is 0"
            )
        return cls(factor, (hidden + _RIDGE * hidden.mean()).sqrt())

    def whitened(self, name: str, matrix: Tensor, e: int, order: Tensor | None) -> Tensor:
        """``[O, I]`` matrix `name` of expert `e`, whose neurons are in `order`."""
        if name != "down":
            return matrix.double() @ self.block
        hidden = self.hidden[e]
        return matrix.double() * (hidden if order is None else hidden[order])


@method("sub_moe", kind="merge", paper="Sub-MoE (2025)", arxiv="2506.23266")
@dataclass(frozen=True)
class SubMoe:
    """The average of a group's members by their shares, projected on what their matrices have in common.

    Attributes:
        rank: share of the singular values that are kept; with 1 it is the plain average.
        align: match the members' neurons to those of the dominant member first, which the paper does not do.
        whiten: decompose the matrices times their inputs, as the paper's extended version does; of the inputs of down
            only the mean squares of each neuron are used.
    """

    rank: float = 1.0
    align: bool = True
    whiten: bool = False

    name: ClassVar[str] = "sub_moe"
    needs_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.rank <= 1:
            raise ConfigError(f"rank is a share of the singular values, above 0 and up to 1, not {self.rank}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("c_in", "h_sq", "n") if self.whiten and self.rank < 1 else ()

    def merge(self, layer: LayerPlan, experts: LayerExperts, statistics: Statistics | None) -> Iterator[Expert]:
        moments = None
        if self.needs:
            if statistics is None:
                raise ConfigError(f"merge 'sub_moe' with whiten needs the statistics {', '.join(self.needs)}")
            moments = _Moments.of(statistics, layer.layer)
        return by_group(layer, experts, lambda members, shares: self._mix(members, shares, experts, moments))

    def _mix(
        self, members: tuple[int, ...], shares: tuple[float, ...], experts: LayerExperts, moments: _Moments | None
    ) -> Expert:
        f, d, g = experts.intermediate_size, experts.hidden_size, len(members)
        unions = {"gate": Union(f, g * d), "up": Union(f, g * d), "down": Union(d, g * f)}

        def parts() -> Iterator[tuple[float, Expert]]:
            found: Iterator[tuple[Expert, Tensor | None]] = ((experts.read(e), None) for e in members)
            if self.align:
                found = aligned(members, experts)
            for e, share, (expert, order) in zip(members, shares, found, strict=True):
                for name, union in unions.items():
                    matrix = getattr(expert, name)
                    if self.rank < 1 and matrix is not None:
                        union.add(matrix if moments is None else moments.whitened(name, matrix, e, order))
                yield share, expert

        mean = weighted_sum(parts())
        if self.rank == 1:
            return mean
        return replace(
            mean,
            gate=None if mean.gate is None else unions["gate"].truncated(mean.gate, self.rank),
            up=unions["up"].truncated(mean.up, self.rank),
            down=unions["down"].truncated(mean.down, self.rank),
        )
