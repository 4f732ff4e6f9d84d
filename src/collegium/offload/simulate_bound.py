"""How many requests an optimal cache of one pool would serve: the yardstick of every policy that loads on demand.

The same rules as `ExpertCache` with the policy "opt" in global scope, as one compiled loop.

Legend: R requests, S steps, C slots.
"""

from __future__ import annotations

import numpy as np

from collegium.jit import njit
from collegium.offload.geometry import Array
from collegium.offload.policies.opt import Stream

__all__ = ["optimal_hits"]


def optimal_hits(stream: Stream, total: int, capacity: int, prefilled: bool = False) -> int:
    """Hits of Belady's MIN with C slots for all layers together.

    Args:
        stream: the requests, each step's in the order they are asked for.
        total: keys there are.
        capacity: C.
        prefilled: a first touch counts as a hit while there is a free slot.
    """
    following, _ = stream.next_uses(total)
    return int(_optimal_hits(stream.keys, stream.starts, following, total, capacity, prefilled))


@njit(nogil=True, cache=True)
def _optimal_hits(keys: Array, starts: Array, following: Array, total: int, capacity: int, prefilled: bool) -> int:
    resident = np.full(capacity, -1)  # key of each slot
    slot = np.full(total, -1)
    until = np.zeros(total, np.int64)  # step of the next use
    last = np.zeros(total, np.int64)  # its last use; of one step's keys the first asked for counts as used last
    touched = np.zeros(total, np.bool_)
    served = np.full(total, -1)  # the step that found each key resident last
    held = np.zeros(total, np.int64)  # keys of the step, in the order of their requests
    pinned = np.zeros(total, np.bool_)
    used = hits = 0
    for s in range(len(starts) - 1):
        first, end = starts[s], starts[s + 1]
        oldest = count = 0
        for r in range(first, end):
            if slot[keys[r]] >= 0:
                hits += 1
                served[keys[r]] = s
                pinned[keys[r]] = True
                held[count] = keys[r]
                count += 1
        for r in range(first, end):
            key = keys[r]
            if served[key] == s:
                continue
            if used < capacity:
                slot[key] = used
                used += 1
                if prefilled and not touched[key]:
                    hits += 1
            else:
                victim, farthest = -1, -1
                for c in range(capacity):
                    other = resident[c]
                    if pinned[other] or until[other] < farthest:
                        continue
                    if until[other] > farthest or last[other] < last[victim]:
                        victim, farthest = other, until[other]
                if victim < 0:  # more experts than slots: the one that was asked for first is done
                    victim = held[oldest]
                    oldest += 1
                    pinned[victim] = False
                slot[key] = slot[victim]
                slot[victim] = -1
            resident[slot[key]] = key
            pinned[key] = True
            held[count] = key
            count += 1
        for r in range(first, end):
            key = keys[r]
            pinned[key] = False
            touched[key] = True
            until[key] = following[r]
            last[key] = first + end - r
    return hits
