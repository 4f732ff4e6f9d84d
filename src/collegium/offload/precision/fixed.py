"""Fixed precision: every expert in the same copy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.precision.base import Choice, PrecisionPolicy, PrecisionSettings

__all__ = ["Fixed"]


@method("fixed", kind="precision", paper="common")
@dataclass(frozen=True)
class Fixed(PrecisionSettings):
    """One copy for all.

    Attributes:
        bits: which; None is the most exact there is.
    """

    bits: int | None = None

    def build(self, geometry: Geometry, bits: tuple[int, ...]) -> PrecisionPolicy:
        wanted = bits[0] if self.bits is None else self.bits
        if wanted not in bits:
            raise ConfigError(f"there is no copy of {wanted} bits, only of {', '.join(map(str, bits))}")
        return _Fixed(geometry, (wanted,))


class _Fixed(PrecisionPolicy):
    constant = True

    def choose(self, choice: Choice) -> Array:
        return np.full(choice.experts.shape, self.bits[0], np.uint8)
