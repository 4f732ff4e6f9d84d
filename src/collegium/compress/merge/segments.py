"""Neurons as vectors that can be compared: row of gate, row of up, column of down, with their entries of the biases.

Where an expert computes ``act(gate) * up``, row of up and column of down may change sign together and nothing else
changes. Such neurons are compared at the better of the two signs; the gate's row has no such freedom.

Legend: n, m neurons, f expert width, d model width, a and b widths of the parts of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.compress.matrices import Expert
from collegium.errors import NonFiniteError
from collegium.experts.weights import ExpertWeights
from collegium.rng import generator

__all__ = ["Projection", "Segments", "flips", "segments"]

_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Segments:
    """Vectors of neurons.

    Attributes:
        fixed: ``[n, a]`` the part whose sign counts.
        signed: ``[n, b]`` the part that may change sign. Either part may be of width 0.
    """

    fixed: Tensor
    signed: Tensor

    def __len__(self) -> int:
        return len(self.fixed)

    def __getitem__(self, rows: Tensor | slice) -> Segments:
        return Segments(self.fixed[rows], self.signed[rows])

    @classmethod
    def cat(cls, parts: Sequence[Segments]) -> Segments:
        """All of them, one after the other."""
        return cls(torch.cat([one.fixed for one in parts]), torch.cat([one.signed for one in parts]))

    def similarity(self, other: Segments) -> Tensor:
        """``[n, m]`` inner products with ``other [m]``, each at its better sign."""
        return (self.signed @ other.signed.T).abs_().addmm_(self.fixed, other.fixed.T)

    def paired(self, other: Segments) -> tuple[Tensor, Tensor]:
        """``(inner product [n], sign [n])`` of row i of both: +1, or -1 where the signed parts must differ in sign."""
        signed = (self.signed * other.signed).sum(1)
        sign = torch.where(signed < 0, -1.0, 1.0)
        return signed.abs() + (self.fixed * other.fixed).sum(1), sign

    def unit(self) -> Segments:
        """The same directions, of length 1; a vector of zeros stays."""
        length = (self.fixed.square().sum(1) + self.signed.square().sum(1)).sqrt().clamp(min=_TINY)[:, None]
        return Segments(self.fixed / length, self.signed / length)


def flips(weights: ExpertWeights) -> bool:
    """Whether the sign of up and down is free: the experts compute exactly ``act(gate) * up``."""
    return weights.gated and weights.fused_activation is not None


def segments(expert: Expert, *, flips: bool, gate: bool = True, scaled: bool = False) -> Segments:
    """``[f]`` the neurons of an expert.

    Args:
        flips: the sign of up and down is free.
        gate: the gate's row is part of the vector.
        scaled: divide each matrix by the mean length of its neurons' vectors, so that none has more say.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
    """
    up, down = _with(expert.up, expert.up_bias), expert.down.T
    parts = [up, down] if expert.gate is None or not gate else [up, down, _with(expert.gate, expert.gate_bias)]
    if not all(bool(torch.isfinite(one).all()) for one in parts):
        raise NonFiniteError("an expert's weights hold NaN or infinity; its neurons cannot be compared")
    if scaled:
        parts = [one / one.norm(dim=1).mean().clamp(min=_TINY) for one in parts]
    none = up.new_zeros(len(up), 0)
    free = parts[:2] if flips else []
    return Segments(torch.cat([none, *parts[len(free) :]], 1), torch.cat([none, *free], 1))


def _with(matrix: Tensor, bias: Tensor | None) -> Tensor:
    """``[f, d]``, or ``[f, d + 1]`` with the bias as the last column."""
    return matrix if bias is None else torch.cat([matrix, bias[:, None]], 1)


class Projection:
    """A fixed random map to `width` dimensions for each part of segments ``like``; inner products stay about the same.

    The error of a cosine is about ``1 / sqrt(width)`` (Johnson and Lindenstrauss, 1984).
    """

    def __init__(self, like: Segments, width: int) -> None:
        self._maps = [
            torch.randn(size, width if size else 0, generator=generator("segments", size, width)) / width**0.5
            for size in (like.fixed.shape[1], like.signed.shape[1])
        ]

    def __call__(self, one: Segments) -> Segments:
        return Segments(one.fixed @ self._maps[0], one.signed @ self._maps[1])
