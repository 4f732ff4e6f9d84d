"""HybriMoE's schedule for two processors and a link: the fast one takes what is resident and heavy, the slow one what
is absent and light, and the link moves what is absent and heavy.

The fast processor computes only from its own memory, the slow one has every expert at hand. Experts stand in one list,
resident before absent, of both the heavy before the light; the fast processor takes from the front, the slow one from
the back, whichever would be done with its candidate earlier. So nothing is worse than leaving all to one of them: a
candidate goes to a processor only while that one is ahead of what the other would need for the rest.

Legend: n experts of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Array

__all__ = ["Hybrid", "HybridSchedule"]


@dataclass(frozen=True)
class HybridSchedule:
    """Who computes what, in which order.

    Attributes:
        fast, slow: places of the experts that each processor computes; the fast one's is the order to ask for them.
        moved: those of the fast one's that the link moves, in the order it moves them.
        fast_seconds, slow_seconds: when each is done.
    """

    fast: tuple[int, ...]
    slow: tuple[int, ...]
    moved: tuple[int, ...]
    fast_seconds: float
    slow_seconds: float

    @property
    def makespan(self) -> float:
        """When both are done."""
        return max(self.fast_seconds, self.slow_seconds)


@method("hybrimoe", kind="scheduler", paper="HybriMoE (2025)", arxiv="2504.05897")
@dataclass(frozen=True)
class Hybrid:
    """Times of two processors and the link between their memories, in seconds. In the paper the last two are 0.

    Attributes:
        fast: of one expert on the fast processor, however many tokens it has.
        slow: of one token of an expert on the slow one.
        slow_start: more for the first expert of a step there, which finds cold caches.
        transfer: of one expert over the link.
        fast_token: more for each token of an expert on the fast processor.
        slow_expert: more for each expert on the slow one, however many tokens it has.
    """

    fast: float
    slow: float
    slow_start: float
    transfer: float
    fast_token: float = 0.0
    slow_expert: float = 0.0

    def __post_init__(self) -> None:
        times = astuple(self)
        if not all(np.isfinite(times)) or min(times) < 0:
            raise ConfigError(f"times of a schedule must be at least 0 seconds, not {times}")

    def schedule(self, resident: Array, counts: Array) -> HybridSchedule:
        """The schedule of one step.

        Args:
            resident: ``[n]`` bool: the fast processor has the expert.
            counts: ``[n]`` tokens that use each.
        """
        order = np.lexsort((-counts, ~resident.astype(np.bool_))).tolist()
        fast: list[int] = []
        slow: list[int] = []
        fast_at = slow_at = link_at = 0.0
        while order:
            front, back = order[0], order[-1]
            arrives = 0.0 if resident[front] else link_at + self.transfer
            fast_done = max(fast_at, arrives) + self._on_fast(int(counts[front]))
            slow_done = slow_at + self._on_slow(int(counts[back]), first=not slow)
            if fast_done <= slow_done:
                fast.append(order.pop(0))
                fast_at, link_at = fast_done, max(link_at, arrives)
            else:
                slow.append(order.pop())
                slow_at = slow_done
        return self.timed(fast, slow, resident, counts)

    def timed(self, fast: Sequence[int], slow: Sequence[int], resident: Array, counts: Array) -> HybridSchedule:
        """The times of a division that somebody else made.

        Args:
            fast, slow: places in the arguments, in the order of each processor.
            resident, counts: as for `schedule`.
        """
        fast_at = slow_at = link_at = 0.0
        moved = tuple(place for place in fast if not resident[place])
        for place in fast:
            link_at += 0.0 if resident[place] else self.transfer
            fast_at = max(fast_at, 0.0 if resident[place] else link_at) + self._on_fast(int(counts[place]))
        for at, place in enumerate(slow):
            slow_at += self._on_slow(int(counts[place]), first=at == 0)
        return HybridSchedule(tuple(fast), tuple(slow), moved, fast_at, slow_at)

    def _on_fast(self, tokens: int) -> float:
        return self.fast + self.fast_token * tokens

    def _on_slow(self, tokens: int, first: bool) -> float:
        return self.slow_expert + self.slow * tokens + (self.slow_start if first else 0.0)
