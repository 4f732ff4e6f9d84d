"""Schedulers: in which order, and on which processor, the experts of a layer are loaded and computed."""

from __future__ import annotations

from collections.abc import Collection, Container
from itertools import islice
from typing import Literal, TypeAlias

from collegium.offload.geometry import Array
from collegium.offload.predictors.base import FEW
from collegium.offload.schedule.hybrimoe import Hybrid, HybridSchedule
from collegium.offload.schedule.popularity import popularity
from collegium.offload.schedule.resident_first import resident_first

__all__ = ["Processors", "divide", "due", "load_order"]

_PARTS = 3

Processors: TypeAlias = Literal["both", "fast", "slow"]
"""Which of two processors compute experts."""


def load_order(resident: Array, mass: Array, counts: Array, tokens: int) -> Array:
    """In which order the engine and the simulator ask for the experts of a step: `resident_first` where a pass has few
    tokens, `popularity` in a prompt.

    Args:
        resident: ``[n]`` bool of each expert.
        mass, counts: ``[n]`` sums of combine weights, and tokens.
        tokens: of the pass.
    """
    return resident_first(resident, mass) if tokens <= FEW else popularity(resident, counts)


def due(held: Collection[int], waiting: Container[int], more: bool) -> list[int]:
    """Which experts of a step to compute now, in the engine and in the simulator.

    All that are there; but while others of the step have no slot yet, the oldest of them only once all of those are
    there, so that who gives way to whom does not depend on how fast the disk was. Of the slots a part is computed at a
    time: the rest is read meanwhile, and calls with several experts waste less.

    Args:
        held: that have slots, in the order of their requests.
        waiting: of them, those whose reads are under way.
        more: whether others have no slot yet.
    """
    if not more:
        return [expert for expert in held if expert not in waiting]
    oldest = list(islice(held, max(1, len(held) // _PARTS)))
    return [] if any(expert in waiting for expert in oldest) else oldest


def divide(
    resident: Array, mass: Array, counts: Array, tokens: int, times: Hybrid, on: Processors = "both"
) -> HybridSchedule:
    """`load_order` where there are two processors: the experts that the fast one computes from the memory that is
    cached, in the order to ask for them, and those that the slow one computes from where they lie meanwhile.

    Args:
        resident, mass, counts, tokens: as for `load_order`; resident in the fast one's memory.
        times: of the processors and the link between them.
        on: "both": HybriMoE's division; "fast" or "slow": all of them on that one.
    """
    if on == "both":
        return times.schedule(resident, counts)
    order = load_order(resident, mass, counts, tokens).tolist()
    return times.timed(order if on == "fast" else (), order if on == "slow" else (), resident, counts)
