"""What factorisations share: ranks, truncation in the plain and in a weighted norm, and experts made of factors.

Legend: m rows and n columns of a matrix, r its rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from collegium.compress.matrices import Expert
from collegium.errors import ConfigError, NonFiniteError
from collegium.experts.loose import LooseExpert, LooseMatrix

__all__ = ["RIDGE", "assemble", "check_settings", "dense_expert", "rank_of", "truncate"]

RIDGE = 1e-5
"""Added to second moments, relative to their mean on the diagonal."""


def check_settings(share: float, rank: int | None) -> None:
    """Raise ConfigError for a share or a rank that is none."""
    if not 0 < share <= 1 or (rank is not None and rank < 1):
        raise ConfigError(f"share is above 0 and up to 1, rank at least 1; got {share} and {rank}")


def rank_of(m: int, n: int, share: float, rank: int | None) -> int:
    """r: `rank` if it is given, else the largest whose factors have `share` of the parameters of ``[m, n]``; at least
    1, at most what a matrix can have."""
    wanted = int(share * m * n / (m + n)) if rank is None else rank
    return max(1, min(wanted, m, n))


def truncate(weight: Tensor, r: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``A [m, r]`` and ``B [r, n]``, whose product is nearest to `weight` among all of rank r.

    The singular values are split between them by square roots. Computed from the eigenvectors of the smaller Gram
    matrix, in float64.

    Args:
        weight: ``[m, n]``.
        moment: second moment ``[n, n]`` of the inputs x, or its diagonal ``[n]``: nearest means the smallest mean
            ``||W x - A B x||^2`` over them. None takes all directions alike.

    Raises:
        NonFiniteError: `weight` holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"a matrix {list(weight.shape)} of an expert holds NaN or infinity, so it has no factors")
    W = weight.double()
    if W.shape[0] <= W.shape[1]:
        # with the whitened matrix M = W L the best product is U U^T M, which is (U U^T W) L
        left = _leading(W @ _times(W.T, moment), r)
        right = left.T @ W
    else:
        root = _root(moment)
        whitened = W if root is None else (W * root if root.dim() == 1 else W @ root)
        v = _leading(whitened.T @ whitened, r)
        left, right = whitened @ v, _unwhiten(v, root).T
    scale = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-300)).sqrt().clamp(min=1e-150)
    return (left * scale).float(), (right / scale[:, None]).float()


def _leading(gram: Tensor, r: int) -> Tensor:
    """The eigenvectors of the r largest eigenvalues, the largest first."""
    return torch.linalg.eigh(gram).eigenvectors[:, -r:].flip(1)


def _root(moment: Tensor | None) -> Tensor | None:
    """L of ``moment = L L^T`` (lower triangle, or the root of a diagonal), with the ridge."""
    if moment is None:
        return None
    moment = _ridged(moment)
    return moment.sqrt() if moment.dim() == 1 else torch.linalg.cholesky(moment)


def _ridged(moment: Tensor) -> Tensor:
    """A second moment in float64 that can be inverted. One of zeros, without inputs, becomes the identity."""
    moment = moment.double()
    diagonal = moment if moment.dim() == 1 else moment.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        return torch.ones_like(moment) if moment.dim() == 1 else torch.eye(len(moment), dtype=moment.dtype)
    added = torch.full_like(diagonal, RIDGE * mean)
    return moment + (added if moment.dim() == 1 else torch.diag(added))


def _times(columns: Tensor, moment: Tensor | None) -> Tensor:
    """``C columns`` for ``columns [n, m]``."""
    if moment is None:
        return columns
    C = _ridged(moment)
    return C[:, None] * columns if C.dim() == 1 else C @ columns


def _unwhiten(v: Tensor, root: Tensor | None) -> Tensor:
    """``L^-T v`` for ``v [n, r]``."""
    if root is None:
        return v
    if root.dim() == 1:
        return v / root[:, None]
    return torch.linalg.solve_triangular(root.T, v, upper=True)


def assemble(expert: Expert, make: Callable[[str, Tensor, Tensor | None], LooseMatrix]) -> LooseExpert:
    """An expert whose matrices are what `make` makes of "gate", "up" and "down", each with its bias."""
    return LooseExpert(
        None if expert.gate is None else make("gate", expert.gate, expert.gate_bias),
        make("up", expert.up, expert.up_bias),
        make("down", expert.down, expert.down_bias),
    )


def dense_expert(expert: Expert) -> LooseExpert:
    """The expert as it is."""
    return assemble(expert, lambda name, weight, bias: LooseMatrix(weight, bias=bias))
