"""What a simulation keeps of each pool, and of the experts of a step in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from collegium.offload.cache import ExpertCache
from collegium.offload.geometry import Array
from collegium.offload.schedule import due
from collegium.offload.simulate_link import Read

__all__ = ["Part", "Pool"]


@dataclass(eq=False)
class Pool:
    """The cache of one precision and the reads for it."""

    bits: int
    nbytes: int
    cache: ExpertCache
    prefilled: Array | None  # [total] bool, keys touched; None where first touches are misses
    flying: dict[tuple[int, int], Read] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)  # read ahead, not asked for since


@dataclass(eq=False)
class Part:
    """The experts of a step in one pool: still to be asked for, and holding slots but not computed."""

    pool: Pool
    left: Array
    rows: dict[int, int]  # expert -> tokens that use it
    held: dict[int, int] = field(default_factory=dict)  # expert -> row of the log
    waiting: set[int] = field(default_factory=set)

    def ready(self) -> list[int]:
        """Experts to compute now, by the engine's rule."""
        return due(self.held, self.waiting, more=len(self.left) > 0)
