"""Popularity: in a prompt, the experts with the fewest tokens are served from the low copy (Fate).

Nearly all experts are needed then, and each for few or many tokens; those with few cost as much to load and matter
least. Text that is generated is served from the high copy.

Legend: T tokens of a pass, K slots, E experts of a layer, n distinct experts of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.precision.base import Choice, PrecisionPolicy, PrecisionSettings
from collegium.offload.precision.fixed import Fixed

__all__ = ["Popularity"]


@method("popularity", kind="precision", paper="Fate (2025)", arxiv="2502.12224")
@dataclass(frozen=True)
class Popularity(PrecisionSettings):
    """The low copy for the least used experts of a prompt; ``share = 0`` is the high copy for all.

    Attributes:
        share: of a layer's distinct experts, rounded down, 0 to 1.
        low: bits of the low copy; None is the least exact there is. The high copy is the most exact.
    """

    share: float = 0.25
    low: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share must be 0 to 1, not {self.share}")

    def build(self, geometry: Geometry, bits: tuple[int, ...]) -> PrecisionPolicy:
        low = bits[-1] if self.low is None else self.low
        if self.share == 0:
            return Fixed().build(geometry, bits)
        if low not in bits[1:]:
            raise ConfigError(
                f"popularity needs a copy of {'fewer' if self.low is None else self.low} bits beside that of {bits[0]} "
                f"bits; there are copies of {', '.join(map(str, bits))} bits. Pack the model with two, or set share=0"
            )
        return _Popularity(geometry, (bits[0], low), self.share)


class _Popularity(PrecisionPolicy):
    def __init__(self, geometry: Geometry, bits: tuple[int, ...], share: float) -> None:
        super().__init__(geometry, bits)
        self._share = share

    def choose(self, choice: Choice) -> Array:
        E = self.geometry.experts[choice.layer]
        bits = np.full(E + 1, self.bits[0], np.uint8)
        experts = np.minimum(choice.experts, E)
        if not choice.decode:
            counts = np.bincount(experts.reshape(-1), minlength=E)[:E]
            used = np.flatnonzero(counts)
            least = used[np.argsort(counts[used], kind="stable")][: int(self._share * len(used))]
            bits[least] = self.bits[-1]
        return bits[experts]
