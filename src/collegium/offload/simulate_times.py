"""`Stopwatch`: the times of a running engine, each part of a pass by itself, as the simulator takes them.

What is timed is what happens anyway, in passes of one token: every call that computes experts, every read, every layer
without these, and what lies between two passes; of prompts, what their experts take. Experts that come one by one are
computed one by one, so a call's fixed time is told apart from what each expert adds, in calls of other numbers of
experts. Reads are timed in the engine's own threads and into its own slots: a disk that reads into memory in a cache,
while no processor is busy, is faster.

The times are means over the middle half of the passes, by how long those took: what else a machine does now and then is
not the engine's.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch

from collegium.errors import ConfigError
from collegium.jit import num_threads
from collegium.offload.cost import CostModel
from collegium.offload.engine import Engine
from collegium.offload.geometry import Array
from collegium.offload.meter import Meter
from collegium.offload.store.source import Bytes

__all__ = ["Stopwatch", "line", "link_times"]


@dataclass
class _Pass:
    """What happened in a pass of one token."""

    start: float
    end: float = 0.0
    outside: float | None = None  # seconds until the next one began
    layers: list[float] = field(default_factory=list)  # seconds before the first call and after the last one
    between: list[float] = field(default_factory=list)  # seconds from one call of a layer to the next
    calls: list[tuple[int, int, float]] = field(default_factory=list)  # bits, experts, seconds
    hits: list[tuple[float, float]] = field(default_factory=list)  # begin of a layer, end of its call without a wait
    waits: list[tuple[float, float]] = field(default_factory=list)  # what ended before one, and its own end


class Stopwatch(Meter):
    """Takes the place of an engine's meter within a context. Its samples stay after that.

    Args:
        engine: whose passes are timed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._since = 0.0  # when the layer that runs now, or the pass, began
        self._before = 0.0  # when the last call ended, or the same
        self._one = False
        self._stalled = 0.0
        self._lead: float | None = None  # seconds before the first call of the layer
        self._passes_seen: list[_Pass] = []
        self._reads: list[tuple[float, float, int]] = []  # begin, end, bytes
        self._wide: dict[int, Array] = defaultdict(lambda: np.zeros(3))  # experts, rows, seconds in prompts, by bits

    def __enter__(self) -> Stopwatch:
        self._meter, self._engine.meter = self._engine.meter, self
        self._stalled, self._one = self._engine.stalled, False
        source, read = self._engine.source, self._engine.source.read

        def timed(layer: int, expert: int, bits: int, into: Bytes) -> None:
            start = time.perf_counter()
            read(layer, expert, bits, into)
            self._reads.append((start, time.perf_counter(), into.nbytes))

        vars(source)["read"] = timed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del vars(self._engine.source)["read"]
        self._engine.meter = self._meter

    # ---- called by the engine ----------------------------------------------------------------------------------------

    def begin(self, tokens: int) -> None:
        """A pass of so many tokens starts."""
        now = time.perf_counter()
        if self._one and tokens == 1:
            self._passes_seen[-1].outside = now - self._since
        self._since, self._before, self._one, self._lead = now, now, tokens == 1, None
        if self._one:
            self._passes_seen.append(_Pass(now))

    def experts(self, bits: int, count: int, rows: int, seconds: float) -> None:
        """So many experts of a copy were computed, for so many rows in all."""
        end = time.perf_counter()
        if self._one:
            now, waited = self._passes_seen[-1], self._engine.stalled - self._stalled
            now.calls.append((bits, count, seconds))
            if waited:
                now.waits.append((self._before, end - seconds))
            apart = end - seconds - self._before - waited
            if self._lead is None:
                self._lead = apart
                if not waited:
                    now.hits.append((self._since, end))
            else:
                now.between.append(apart)
        else:
            self._wide[bits] += (count, rows, seconds)
        self._stalled, self._before = self._engine.stalled, end

    def layer(self) -> None:
        """A layer's experts are done."""
        now = time.perf_counter()
        if self._one:
            self._passes_seen[-1].layers.append((self._lead or 0.0) + now - self._before)
            self._passes_seen[-1].end = now
        self._since, self._before, self._lead = now, now, None

    # ---- what was found ----------------------------------------------------------------------------------------------

    def cost(self, disk: CostModel) -> CostModel:
        """The times of this model on this machine.

        Args:
            disk: gives what was not seen: the disk where nothing was read, and the rate of memory.

        Raises:
            ConfigError: fewer than two tokens were written one after the other, so nothing was measured.
        """
        passes = [one for one in self._passes_seen if one.outside is not None and one.layers]
        if not passes:
            raise ConfigError("nothing was measured: let the model write at least two tokens first")
        seen = len(passes)
        passes = sorted(passes, key=lambda one: one.end - one.start)[seen // 4 : seen - seen // 4]
        by_bits: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for bits, count, seconds in (call for one in passes for call in one.calls):
            by_bits[bits].append((count, seconds))
        points, fixed = {}, 0.0
        for bits, calls in by_bits.items():
            counts, times = zip(*calls, strict=True)
            call, each = line(counts, times)
            if len(set(counts)) == 1:
                call, each = 0.0, call / counts[0]
            points[bits] = ((1.0, each), *self._prompt_point(bits))
            fixed += len(calls) * call
        fixed += sum(seconds for one in passes for seconds in one.between)
        reads = [read for read in self._reads if any(one.start <= read[0] <= one.end for one in passes)]
        update = {
            "expert": points,
            "call_seconds": fixed / max(sum(map(len, by_bits.values())), 1),
            "layer_seconds": statistics.fmean(seconds for one in passes for seconds in one.layers),
            "outside_seconds": statistics.fmean(one.outside for one in passes if one.outside is not None),
            "readers": self._engine.reader.threads,
            "measured": f"{disk.measured}; {seen} tokens written one by one",
        }
        if reads:
            bandwidth, delay = link_times(reads)
            update |= {"read_bandwidth": bandwidth, "read_latency": 0.0, "read_delay": delay}
            update["spare"] = _begin_at_once(reads, [hit for one in passes for hit in one.hits])
            update["wake_seconds"] = _wake(reads, [wait for one in passes for wait in one.waits])
        return CostModel.model_validate({**disk.model_dump(), **update})

    def _prompt_point(self, bits: int) -> list[tuple[float, float]]:
        """Rows of an expert in prompts, and its seconds, on average."""
        count, rows, seconds = self._wide[bits].tolist()
        return [(rows / count, seconds / count)] if rows > count else []


def _wake(reads: Sequence[tuple[float, float, int]], waits: Sequence[tuple[float, float]]) -> float:
    """From the end of a read to the computing that stood still for it, which is when a wait is over."""
    ends = np.sort([end for _, end, _ in reads])
    found = []
    for before, over in waits:
        at = int(np.searchsorted(ends, before))
        if at < len(ends) and ends[at] <= over:
            found.append(over - float(ends[at]))
    return statistics.fmean(found) if found else 0.0


def _begin_at_once(reads: Sequence[tuple[float, float, int]], hits: Sequence[tuple[float, float]]) -> bool:
    """Whether most reads of a layer begin while its residents are computed, and not after. Where no residents were
    computed while others were read, they do if there are more processors than threads that compute."""
    begins = np.sort([begin for begin, _, _ in reads])
    early = late = 0
    for since, end in hits:
        at = int(np.searchsorted(begins, since))
        if at < len(begins) and begins[at] < end + (end - since):  # else it is another layer's
            early, late = early + int(begins[at] < end), late + int(begins[at] >= end)
    return early >= late if early + late else num_threads() > torch.get_num_threads()


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of the line through the means of y at each x, neither below 0; flat if there is but
    one x."""
    at, values = np.asarray(x, np.float64), np.asarray(y, np.float64)
    places, counts = np.unique(at, return_counts=True)
    means: Array = np.array([values[at == place].mean() for place in places])
    if len(places) == 1:
        return float(means[0]), 0.0
    slope, intercept = np.polyfit(places, means, 1, w=np.sqrt(counts))
    if slope < 0:
        return float((counts * means).sum() / counts.sum()), 0.0
    if intercept < 0:
        return 0.0, float((counts * places * means).sum() / (counts * places**2).sum())
    return float(intercept), float(slope)


def link_times(reads: Sequence[tuple[float, float, int]]) -> tuple[float, float]:
    """Bytes a second of reads that queue, and the delay of a read that finds the link idle.

    Args:
        reads: begin, end and bytes of each.
    """
    queued, alone, before = [], [], -np.inf
    for start, end, nbytes in sorted(reads, key=lambda read: read[1]):
        if start < before:
            queued.append((end - before) / nbytes)
        else:
            alone.append((end - start, nbytes))
        before = end
    if not queued:
        return 1 / statistics.fmean(seconds / nbytes for seconds, nbytes in alone), 0.0
    each = max(statistics.fmean(queued), 1e-15)
    whole, size = statistics.fmean(seconds for seconds, _ in alone), float(np.mean([nbytes for _, nbytes in alone]))
    return 1 / each, max(0.0, whole - size * each)
