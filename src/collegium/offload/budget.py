"""`Budget`: how a given number of bytes is shared among everything that a process holds, before experts are read.

What can be counted is counted (weights, keys and values of the context, slots); what cannot (interpreter, libraries,
compiled kernels, the largest intermediate results) is measured: the model runs once without its experts, on as many
tokens as a pass may have, and the peak of that is what it takes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from collegium.errors import ConfigError

__all__ = ["MARGIN", "Budget", "parse_bytes", "share_slots"]

MARGIN = 0.02
"""Share of the memory that is left alone: allocators round up, and threads come and go."""

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "6GiB", "800MB" or "7000000".

    Raises:
        ConfigError: it is no size, or not above 0.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"{text!r} is no size; write it like 6GiB, 800MB or 7000000")
    unit = found[2].lower()
    factor = 1024 ** " kmgt".index(unit) if found[3] else _UNITS[unit]
    nbytes = int(float(found[1]) * factor)
    if nbytes <= 0:
        raise ConfigError(f"{text!r} is no memory at all")
    return nbytes


@dataclass(frozen=True)
class Budget:
    """A plan of memory, all in bytes.

    Attributes:
        memory: what was asked for; None is no limit.
        process: interpreter, libraries and kernels, measured.
        weights: everything of the model but the experts.
        cache: keys and values of the whole context, for all sequences that run together.
        working: intermediate results of the largest pass, measured.
        slot: one expert, in each precision that is used.
        slots: how many of each there are.
    """

    memory: int | None
    process: int
    weights: int
    cache: int
    working: int
    slot: dict[int, int]
    slots: dict[int, int]

    @property
    def fixed(self) -> int:
        """Everything but the slots."""
        return self.process + self.weights + self.cache + self.working

    @property
    def total(self) -> int:
        """What is used when all slots are full."""
        return self.fixed + sum(self.slot[bits] * count for bits, count in self.slots.items())

    def rows(self) -> list[tuple[str, int]]:
        """``(what, bytes)`` to print."""
        slots = [(f"{count} experts of {bits} bits", self.slot[bits] * count) for bits, count in self.slots.items()]
        return [
            ("interpreter and libraries", self.process),
            ("weights besides the experts", self.weights),
            ("keys and values of the context", self.cache),
            ("intermediate results", self.working),
            *slots,
        ]


def share_slots(
    memory: int | None,
    *,
    process: int,
    weights: int,
    cache: int,
    working: int,
    slot: dict[int, int],
    most: int,
    least: int,
    low_share: float = 0.2,
) -> Budget:
    """Give what is left of `memory` to slots.

    Args:
        memory: None gives every expert a slot.
        slot: bytes of a slot in each precision, most exact first. A second precision gets `low_share` of the bytes.
        most: experts there are, or as many as are wanted; more slots than that are never made.
        least: fewest slots of each precision that work.

    Raises:
        ConfigError: there is too little; the message says how much would do.
    """
    if most < least:
        raise ConfigError(f"{most} experts are too few; each layer needs one, and those of a token must fit: {least}")
    fixed = process + weights + cache + working
    exact, *low = slot
    if memory is None:
        return Budget(None, process, weights, cache, working, slot, dict.fromkeys(slot, most))
    left = int(memory * (1 - MARGIN)) - fixed
    needed = least * sum(slot.values())
    if left < needed:
        smallest = int((fixed + needed) / (1 - MARGIN)) + 1
        raise ConfigError(
            f"{memory / 2**30:.2f} GiB is too little: interpreter and libraries {process / 2**20:,.0f} MiB, weights "
            f"besides the experts {weights / 2**20:,.0f} MiB, keys and values of the context {cache / 2**20:,.0f} MiB, "
            f"intermediate results {working / 2**20:,.0f} MiB, and at least {least} experts "
            f"{needed / 2**20:,.0f} MiB; the smallest memory that works is {-(-smallest // 2**20)}MiB"
        )
    shares = {exact: left}
    for bits in low:
        shares[bits] = min(int(left * low_share), most * slot[bits])
        shares[exact] -= shares[bits]
    slots = {bits: max(least, min(most, shares[bits] // slot[bits])) for bits in slot}
    if low and sum(slots[bits] * slot[bits] for bits in slot) > left:
        slots[exact] = (left - sum(slots[bits] * slot[bits] for bits in low)) // slot[exact]
    return Budget(memory, process, weights, cache, working, slot, slots)
