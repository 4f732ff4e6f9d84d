"""`PrecisionPolicy`: which copy of an expert a token gets, or none.

This is the one part of running in little memory that changes what a model computes, so the default never does, and each
policy has a neutral setting under which outputs are bit-identical.

Legend: T tokens of a pass, K slots, E experts of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from collegium.offload.geometry import Array, Geometry

__all__ = ["SKIP", "Choice", "PrecisionPolicy", "PrecisionSettings"]

SKIP = 0
"""In place of bits: the assignment is left out, and the weights of the others stay as they are."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What one layer of a pass is about to ask for.

    Attributes:
        layer: which, counted from 0.
        experts: ``[T, K]`` ids, >= E in unused slots.
        weights: ``[T, K]`` combine weights.
        resident: ``[E]`` bool: the most exact copy is in memory or on its way.
        decode: one token a sequence, not a prompt.
    """

    layer: int
    experts: Array
    weights: Array
    resident: Array
    decode: bool


class PrecisionPolicy(ABC):
    """State of a policy for one model.

    Args:
        bits: the copies there are, most exact first.

    Attributes:
        constant: it always chooses ``bits[0]``; the engine then never asks.
    """

    constant: ClassVar[bool] = False

    def __init__(self, geometry: Geometry, bits: tuple[int, ...]) -> None:
        self.geometry, self.bits = geometry, bits

    @property
    def used_bits(self) -> tuple[int, ...]:
        """The copies it may choose, most exact first; the engine reserves slots for those only."""
        return self.bits

    @abstractmethod
    def choose(self, choice: Choice) -> Array:
        """``[T, K]`` uint8: bits of the copy for each assignment, or `SKIP`. Where tokens differ about an expert, the
        most exact copy that any of them wants serves all."""

    def ahead(self, layer: int) -> Array:
        """``[E]`` uint8: the copy of each expert of a layer to read before it is known who asks for it; the most exact
        one, where that depends on the token."""
        return np.full(self.geometry.experts[layer], self.bits[0], np.uint8)


@dataclass(frozen=True)
class PrecisionSettings(ABC):
    """Settings of a precision policy."""

    @abstractmethod
    def build(self, geometry: Geometry, bits: tuple[int, ...]) -> PrecisionPolicy:
        """A policy over these copies. Raises ConfigError where it needs others."""
