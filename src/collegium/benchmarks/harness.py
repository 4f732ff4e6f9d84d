"""The form of every benchmark: rows that compare us with a peer in one run, beside the physical limit.

A benchmark is a module of this package with a docstring and a function ``run(quick, say) -> Iterator[Row]``;
``collegium bench NAME`` finds it by its file name. `say` takes a line about what is being measured. Modules whose names
begin with an underscore are parts of benchmarks.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch

from collegium.errors import ConfigError

__all__ = ["Row", "Say", "benchmarks", "cost", "find", "gemm_rate", "medians", "memory_bandwidth"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One point of a benchmark.

    Attributes:
        name: what was measured.
        ours, peer: median seconds of a call, or another cost in `unit`; `peer` is None where nothing compares. `ours`
            is NaN, and None in `record`, where nothing could be measured; `limit` says why.
        peer_name: which peer that was; where there are several, the fastest.
        goal: what `ratio` should reach, or None.
        limit: the physical bound in words and numbers.
        share: the part of that bound that we reach (1 is all of it), or None where there is none.
        most: what `ours` may be at most, or None.
        within: how far `ours` may be from `peer`, to either side, as a share of it, or None: where the peer is not one
            to beat but the truth.
        unit: of `ours`, `peer` and `most`: "s" or "bytes", of which less is better, or "share", of which more is.
    """

    name: str
    ours: float
    peer: float | None
    peer_name: str = ""
    goal: float | None = None
    limit: str = ""
    share: float | None = None
    most: float | None = None
    unit: str = "s"
    within: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the peer we are: above 1 is better for us."""
        if self.peer is None:
            return None
        return self.ours / self.peer if self.unit == "share" else self.peer / self.ours

    @property
    def met(self) -> bool | None:
        """Whether every goal is reached; None without one."""
        goals = []
        if self.goal is not None:
            goals.append(self.ratio is not None and self.ratio >= self.goal)
        if self.most is not None:
            goals.append(self.ours <= self.most)
        if self.within is not None:
            goals.append(self.peer is not None and abs(self.ours / self.peer - 1) <= self.within)
        return all(goals) if goals else None

    def record(self) -> dict[str, Any]:
        """The row as plain data."""
        found = {**asdict(self), "ratio": self.ratio, "met": self.met}
        return found | ({"ours": None, "ratio": None} if math.isnan(self.ours) else {})


def cost(value: float | None, unit: str) -> str:
    """Seconds, bytes or a share as a person reads them; NaN and None were not measured."""
    if value is None or math.isnan(value):
        return "not measured"
    if unit == "share":
        return f"{value:.1%}"
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def benchmarks() -> list[str]:
    """Names of all benchmarks."""
    package = importlib.import_module("collegium.benchmarks")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in names if name != "harness" and not name.startswith("_"))


def find(name: str) -> ModuleType:
    """The module of a benchmark.

    Raises:
        ConfigError: there is none of that name; the message lists them.
    """
    if name not in benchmarks():
        raise ConfigError(f"no benchmark is named {name!r}; there are {', '.join(benchmarks())}")
    return importlib.import_module(f"collegium.benchmarks.{name}")


def medians(calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each call, taken in turns (A B C A B C ...), so that a machine's moods hit all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def memory_bandwidth(nbytes: int = 1 << 30, repeats: int = 5) -> float:
    """Bytes per second that this machine reads from memory with all of torch's threads.

    The fastest of several sums, and matrix-vector products, over an array much larger than the caches.
    """
    matrix, vector = torch.ones(nbytes // 8192, 2048), torch.ones(2048)
    best = min(_seconds(call) for _ in range(repeats) for call in (matrix.sum, lambda: matrix @ vector))
    return matrix.nbytes / best


def gemm_rate(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations per second of torch's matrix product of two square matrices, the fastest of several."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = min(_seconds(lambda: a @ b) for _ in range(repeats + 1))
    return 2 * size**3 / best


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rows(name: str, quick: bool, say: Say) -> Iterator[Row]:
    """Run a benchmark; rows come as they are measured."""
    yield from find(name).run(quick, say)
