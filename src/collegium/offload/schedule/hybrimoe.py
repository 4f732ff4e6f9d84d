"""HybriMoE's schedule for two processors and a link: the fast one takes what is resident and heavy, the slow one what
is absent and light, and the link moves what is absent and heavy.

The fast processor computes only from its own memory, the slow one has every expert at hand. Experts stand in one list,
resident before absent, of both the heavy before the light; the fast processor takes from the front, the slow one from
the back, whichever would be done with its candidate earlier. So nothing is worse than leaving all to one of them: a
candidate goes to a processor only while that one is ahead of what the other would need for the rest.

This machine has one processor and no link between two, so the schedule is for simulation, and for a machine with a GPU.

Legend: n experts of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Array

__all__ = ["Hybrid", "HybridSchedule"]


@dataclass(frozen=True)
class HybridSchedule:
    """Who computes what, in which order.

    Attributes:
        fast, slow: places of the experts that each processor computes.
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
    """Times of two processors and the link between their memories, in seconds.

    Attributes:
        fast: of one expert on the fast processor, however many tokens it has.
        slow: of one token of an expert on the slow one.
        slow_start: more for the first expert of a step there, which finds cold caches.
        transfer: of one expert over the link.
    """

    fast: float
    slow: float
    slow_start: float
    transfer: float

    def __post_init__(self) -> None:
        times = (self.fast, self.slow, self.slow_start, self.transfer)
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
        moved: list[int] = []
        fast_at = slow_at = link_at = 0.0
        while order:
            front, back = order[0], order[-1]
            arrives = 0.0 if resident[front] else link_at + self.transfer
            fast_done = max(fast_at, arrives) + self.fast
            slow_done = slow_at + self.slow * int(counts[back]) + (0 if slow else self.slow_start)
            if fast_done <= slow_done:
                fast.append(order.pop(0))
                fast_at = fast_done
                if not resident[front]:
                    moved.append(front)
                    link_at = arrives
            else:
                slow.append(order.pop())
                slow_at = slow_done
        return HybridSchedule(tuple(fast), tuple(slow), tuple(moved), fast_at, slow_at)

    def all_fast(self, resident: Array) -> float:
        """Seconds if the fast processor does all, moving what it lacks one after another."""
        done = link = 0.0
        for there in sorted(resident.tolist(), reverse=True):
            link += 0.0 if there else self.transfer
            done = (done if there else max(done, link)) + self.fast
        return done

    def all_slow(self, counts: Array) -> float:
        """Seconds if the slow processor does all."""
        return self.slow * int(counts.sum()) + self.slow_start if len(counts) else 0.0
