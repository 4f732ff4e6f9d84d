"""Compiled loops over the experts of a layer, and the layers of a trace in threads.

Every loop is linear in the number of assignments and holds the interpreter's lock only to be called.

Legend: N tokens in reading order, K slots a token, E experts (ids >= E are unused slots), S sequences, B blocks of
documents, m tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from collegium.errors import TraceError
from collegium.jit import njit, num_threads
from collegium.measure.tokens import Tokens
from collegium.trace import Trace

__all__ = [
    "balance",
    "count_by",
    "each_layer",
    "lru_depths",
    "sch_depths",
    "segment_routers",
    "window_counts",
]

Array = np.ndarray[Any, np.dtype[Any]]
T = TypeVar("T")

_AHEAD = 1 << 38  # what a coming activation weighs: more than any last use, of which there are tokens x slots


def each_layer(trace: Trace, tokens: Tokens, function: Callable[[int, int, Array], T]) -> list[T]:
    """``function(layer, E, experts [N, K])`` for every traced layer, in order; a few layers are in memory at a time.

    Raises:
        TraceError: a token has one expert more than once in an iteration of the layer.
    """

    def one(layer: int) -> T:
        entry = trace.meta.layer(layer)
        E = entry.num_experts
        experts = tokens.experts(trace, layer)
        repeat = _first_repeat(experts, E, entry.iterations)
        if repeat >= 0:
            row = repeat if tokens.order is None else int(tokens.order[repeat])
            often = "twice" if entry.iterations == 1 else f"more than {entry.iterations} times, once an iteration"
            raise TraceError(
                f"{trace.folder}: row {row} lists an expert of layer {layer} {often} ({experts[repeat].tolist()}); "
                "a token's experts must differ"
            )
        return function(layer, E, experts)

    with ThreadPoolExecutor(num_threads()) as pool:
        return list(pool.map(one, trace.layers))


@njit(nogil=True, cache=True)
def _first_repeat(experts: Array, E: int, most: int) -> int:
    """The first token with an expert more than `most` times, or -1."""
    N, K = experts.shape
    seen = np.full(E, -1)
    times = np.zeros(E, np.int64)
    for t in range(N):
        for k in range(K):
            e = experts[t, k]
            if e < E:
                times[e] = times[e] + 1 if seen[e] == t else 1
                if times[e] > most:
                    return t
                seen[e] = t
    return -1


@njit(nogil=True, cache=True)
def count_by(experts: Array, code: Array, codes: int, E: int) -> Array:
    """``[codes, E]`` assignments of the tokens of each ``code [N]``."""
    N, K = experts.shape
    counts = np.zeros((codes, E), np.int64)
    for t in range(N):
        row = counts[code[t]]
        for k in range(K):
            e = experts[t, k]
            if e < E:
                row[e] += 1
    return counts


@njit(nogil=True, cache=True)
def balance(counts: Array) -> tuple[float, float, float]:
    """MaxVio, coefficient of variation and entropy (bits) of ``[E]`` counts that are not all zero."""
    E = len(counts)
    mean = counts.sum() / E
    variance = entropy = 0.0
    for n in counts:
        variance += (n / mean - 1) ** 2 / E
        if n > 0:
            entropy -= n / (mean * E) * np.log2(n / (mean * E))
    return counts.max() / mean - 1, np.sqrt(variance), entropy


@njit(nogil=True, cache=True)
def window_counts(experts: Array, starts: Array, block: Array, m: int, E: int, B: int) -> tuple[Array, Array]:
    """How many windows of m tokens hold an expert f times, for f >= 1; windows slide by one within each sequence.

    A window's count of an expert changes only where the expert enters or leaves it, so what is added at each change is
    the number of windows since the last one. The bins f = 0 are left undefined.

    Args:
        starts: ``[S + 1]``.
        block: ``[N]`` of each token; a sequence counts for the block of its first one.

    Returns:
        ``[E, m + 1]`` by expert and ``[B, m + 1]`` by block, over all experts.
    """
    K = experts.shape[1]
    by_expert = np.zeros((E, m + 1), np.int64)
    by_block = np.zeros((B, m + 1), np.int64)
    inside = np.zeros(E, np.int64)  # activations in the window
    since = np.zeros(E, np.int64)  # the window where that changed last; of no meaning while `inside` is 0
    for s in range(len(starts) - 1):
        first, last = starts[s], starts[s + 1] - m  # windows, named after their first token
        if last < first:
            continue
        group = by_block[block[first]]
        for t in range(first, first + m):
            for k in range(K):
                e = experts[t, k]
                if e < E:
                    inside[e] += 1
                    since[e] = first
        for t in range(first, last):
            for step in range(2):
                row, change = (t, -1) if step == 0 else (t + m, 1)
                for k in range(K):
                    e = experts[row, k]
                    if e < E:
                        f = inside[e]
                        run = t + 1 - since[e]
                        by_expert[e, f] += run
                        group[f] += run
                        inside[e] = f + change
                        since[e] = t + 1
        for t in range(last, last + m):
            for k in range(K):
                e = experts[t, k]
                if e < E and inside[e] > 0:
                    run = last + 1 - since[e]
                    by_expert[e, inside[e]] += run
                    group[inside[e]] += run
                    inside[e] = 0
    return by_expert, by_block


@njit(nogil=True, cache=True)
def segment_routers(windows: Array, lengths: Array) -> Array:
    """The best answers of a router that says "active in the whole window" exactly if f >= alpha, over all alpha.

    Args:
        windows: ``[sum of (m + 1)]`` how many windows (of one expert or many) hold it 0 .. m times, length by length.
        lengths: ``[M]`` the lengths m.

    Returns:
        ``[M, 3]``: its F1; the activations it predicts relative to the true ones (of equally good answers, those of the
        thriftiest); the F1 of predicting everything. NaN where there is no true activation.
    """
    found = np.full((len(lengths), 3), np.nan)
    first = 0
    for at in range(len(lengths)):
        m = lengths[at]
        truth = 0.0
        for f in range(m + 1):
            truth += f * windows[first + f]
        if truth > 0:
            matches = predicted = score = 0.0
            found[at, 0] = 0
            for f in range(m, -1, -1):
                matches += f * windows[first + f]
                predicted += m * windows[first + f]
                score = 2 * matches / (predicted + truth)
                if score > found[at, 0]:
                    found[at, 0], found[at, 1] = score, predicted / truth
            found[at, 2] = score
        first += m + 1
    return found


@njit(nogil=True, cache=True)
def lru_depths(experts: Array, E: int, block: Array, B: int) -> Array:
    """How many other experts were used since the last use of each requested one, before its token.

    Within a token the earlier slot counts as used later, so that the last slot is evicted first.

    Args:
        block: ``[N]`` of each token, below B.

    Returns:
        ``[B, E]`` requests of each block by that number; an LRU cache of capacity C >= K hits the first C entries.
        First touches are in none of them.
    """
    N, K = experts.shape
    depths = np.zeros((B, E), np.int64)
    used = np.full(E, -1)
    for t in range(N):
        for k in range(K):
            e = experts[t, k]
            if e < E and used[e] >= 0:
                since = used[e]
                later = 0
                for other in range(E):  # without a branch, so that it is done in vector registers
                    later += used[other] > since
                depths[block[t], later] += 1
        for k in range(K):
            if experts[t, k] < E:
                used[experts[t, k]] = t * K + K - 1 - k
    return depths


@njit(nogil=True, cache=True)
def sch_depths(experts: Array, E: int, m: int, block: Array, B: int) -> Array:
    """How deep in the cache requested experts lie if evictions look m >= 1 tokens ahead, for all capacities at once.

    After a token is served, a cache keeps the token's experts and, of its other residents, those with the most
    activations in the next m tokens; of equals the last used, within a token the earlier slot. Whatever the capacity
    C >= K, the order of preference is the same, so the smaller cache's content is always part of the larger one's
    (Mattson et al., 1970): one stack whose first C entries are the cache of capacity C. Below the token's experts each
    place keeps the better of its resident and the best of those that gave way above.

    Args:
        block: ``[N]`` of each token, below B.

    Returns:
        ``[B, E]`` requests of each block found at each place; a cache of capacity C >= K hits the first C entries.
        First touches are in none of them.
    """
    N, K = experts.shape
    depths = np.zeros((B, E), np.int64)
    stack = np.zeros(E, np.int64)
    size = 0
    worth = np.zeros(E, np.int64)  # coming activations x _AHEAD + last use
    asked = np.full(E, -1)
    moved = np.zeros(E + K, np.int64)  # a queue of residents that gave way, the most worth keeping first
    for t in range(-m, N):
        if t + m < N:
            for k in range(K):
                if experts[t + m, k] < E:
                    worth[experts[t + m, k]] += _AHEAD
        if t < 0:
            continue
        requests = 0
        for k in range(K):
            e = experts[t, k]
            if e < E:
                asked[e] = t
                worth[e] -= _AHEAD
                requests += 1
        found = head = tail = place = 0
        while found < requests and place < size:
            e = stack[place]
            if asked[e] == t:
                depths[block[t], place] += 1
                found += 1
            else:
                at = tail
                while at > head and worth[moved[at - 1]] < worth[e]:
                    moved[at] = moved[at - 1]
                    at -= 1
                moved[at] = e
                tail += 1
            place += 1
            if place > requests:
                stack[place - 1] = moved[head]
                head += 1
        for _ in range(requests - found):  # first touches
            size += 1
            place += 1
            if place > requests:
                stack[place - 1] = moved[head]
                head += 1
        place = 0
        for k in range(K):
            e = experts[t, k]
            if e < E:
                stack[place] = e
                place += 1
                worth[e] = (worth[e] // _AHEAD) * _AHEAD + t * K + K - 1 - k
    return depths
