"""`CostModel`: how long reads and computations take on one machine, for the simulator and the schedulers.

The link between disk and memory is one server, whatever the number of readers: a read of n bytes occupies it for
``read_latency + n / read_bandwidth``. Both numbers describe several readers at work together, since that is how experts
are read. A read that finds the link idle also waits for ``read_delay``; of reads that queue, the delays of as many as
there are readers pass at once, behind the bytes of others.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from collegium.errors import ConfigError, StorageError
from collegium.files import atomic_file, read_record

__all__ = ["CostModel", "measure_cost"]

_ALIGNMENT = 4096
_SMALL = 1 << 16
_LIMIT = 1 << 20
_INTO = 32 << 20  # bytes that a reader reads into


class CostModel(BaseModel):
    """Times of one machine and model, in seconds and bytes.

    Attributes:
        read_bandwidth: bytes a second of experts that follow one another on the link.
        read_latency: seconds that a read takes beyond that.
        readers: reads that are under way at once.
        read_delay: seconds from a read's beginning until its first byte can come.
        wake_seconds: from the end of a read until a pass that stands still for it goes on.
        spare: there is a processor for readers while experts are computed. Without one no read begins meanwhile.
        memory_bandwidth: bytes a second at which weights stream from memory.
        call_seconds: of computing some experts of a layer together, besides what each takes: to start and to take note.
        expert: bits -> points (rows, seconds) of computing one expert of so many rows, ascending; between them times
            are interpolated, beyond the last they go on with its slope. Without points an expert takes as long as its
            bytes take to stream from memory, whatever its rows.
        layer_seconds: of the rest of one MoE layer and of what lies between it and the next, for one token.
        layer_token_seconds: for every further token of a pass.
        outside_seconds: of a pass outside the layers, for one token.
        outside_token_seconds: for every further token.
        measured: where the numbers come from, in words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    read_bandwidth: float = Field(gt=0, allow_inf_nan=False)
    read_latency: float = Field(ge=0, allow_inf_nan=False)
    readers: int = Field(default=1, ge=1)
    read_delay: float = Field(default=0, ge=0, allow_inf_nan=False)
    wake_seconds: float = Field(default=0, ge=0, allow_inf_nan=False)
    spare: bool = True
    memory_bandwidth: float = Field(gt=0, allow_inf_nan=False)
    call_seconds: float = Field(default=0, ge=0, allow_inf_nan=False)
    expert: dict[int, tuple[tuple[float, float], ...]] = Field(default_factory=dict)
    layer_seconds: float = Field(default=0, ge=0, allow_inf_nan=False)
    layer_token_seconds: float = Field(default=0, ge=0, allow_inf_nan=False)
    outside_seconds: float = Field(default=0, ge=0, allow_inf_nan=False)
    outside_token_seconds: float = Field(default=0, ge=0, allow_inf_nan=False)
    measured: str

    @field_validator("expert")
    @classmethod
    def _ascending(
        cls, expert: dict[int, tuple[tuple[float, float], ...]]
    ) -> dict[int, tuple[tuple[float, float], ...]]:
        for bits, points in expert.items():
            rows = [row for row, _ in points]
            if not points or rows != sorted(set(rows)) or rows[0] < 1 or min(seconds for _, seconds in points) < 0:
                raise ValueError(f"the points of {bits} bits must have ascending rows from 1 and times of at least 0")
        return expert

    def read_seconds(self, nbytes: int) -> float:
        """Seconds that a read occupies the link."""
        return self.read_latency + nbytes / self.read_bandwidth

    def expert_seconds(self, rows: int, bits: int, nbytes: int) -> float:
        """Seconds to compute one expert for `rows` tokens."""
        points = self.expert.get(bits)
        if points is None:
            return nbytes / self.memory_bandwidth
        (first, low), *more = points
        if rows <= first or not more:
            return low
        x, y = zip(*points, strict=True)
        if rows > x[-1]:
            return y[-1] + max(0.0, (y[-1] - y[-2]) / (x[-1] - x[-2])) * (rows - x[-1])
        return float(np.interp(rows, x, y))

    def call(self, rows: Sequence[int], bits: int, nbytes: int) -> float:
        """Seconds to compute some experts of a layer together, each for so many tokens."""
        return self.call_seconds + sum(self.expert_seconds(count, bits, nbytes) for count in rows)

    def layer(self, tokens: int) -> float:
        """Seconds of everything of a layer but its experts."""
        return self.layer_seconds + self.layer_token_seconds * (tokens - 1)

    def outside(self, tokens: int) -> float:
        """Seconds of a pass outside its layers."""
        return self.outside_seconds + self.outside_token_seconds * (tokens - 1)

    def save(self, file: Path) -> None:
        """Write the model as JSON. Raises StorageError."""
        with atomic_file(file) as partial:
            partial.write_text(self.model_dump_json(indent=1), encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> CostModel:
        """Read a cost model.

        Raises:
            ConfigError: the file is missing or not one; the field is named.
        """
        return read_record(file, cls, what="cost model", limit=_LIMIT, error=ConfigError)


def measure_cost(folder: Path, *, record: int = 4 << 20, size: int = 128 << 20, readers: int = 3) -> CostModel:
    """Measure how fast the disk under `folder` is read, with a temporary file, and how fast memory streams.

    Reads go past the page cache where the file system lets them. What a layer and the rest of the model take is the
    engine's to measure: here it is 0. Takes about three seconds.

    Args:
        record: bytes of the larger reads, such as one expert.
        size: bytes of the temporary file.
        readers: threads that read together.

    Raises:
        StorageError: no file of that size can be written there.
    """
    record = -(-max(record, 4 * _SMALL) // _ALIGNMENT) * _ALIGNMENT
    size = max(size, 4 * record)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".cost-") as file:
            block = np.random.default_rng(0).bytes(1 << 20)
            for _ in range(-(-size // len(block))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            direct = _is_direct(file.name)
            small, large = (_seconds_a_read(file.name, n, size, readers, direct) for n in (_SMALL, record))
            alone = _seconds_a_read(file.name, record, size, 1, direct)
    except OSError as error:
        raise StorageError(f"cannot measure reads in {folder}: {error.strerror or error}") from error
    bandwidth = (record - _SMALL) / max(large - small, 1e-9)
    if small >= large:  # a disk that is all latency, or none at all
        bandwidth = record / large
    way = "past the page cache" if direct else "through the page cache, which the file system does not let us avoid"
    return CostModel(
        read_bandwidth=bandwidth,
        read_latency=max(0.0, large - record / bandwidth),
        readers=readers,
        read_delay=max(0.0, alone - large),
        memory_bandwidth=_memory_bandwidth(),
        measured=f"reads of {record} bytes by {readers} threads {way}; layers not measured",
    )


def _is_direct(name: str) -> bool:
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        os.close(os.open(name, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def _seconds_a_read(name: str, nbytes: int, size: int, readers: int, direct: bool, seconds: float = 0.5) -> float:
    """Time that one read of `nbytes` at a random place occupies the disk, while all readers are busy: a median, since
    one read in thousands may take a disk that others share for seconds."""
    handle = os.open(name, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    ends: list[float] = []
    errors: list[OSError] = []
    start = time.perf_counter()

    def read(number: int) -> None:
        draw = np.random.default_rng(number)
        # bytes go where no cache holds memory, as experts do; it begins at a page, as direct reads ask for
        with contextlib.closing(mmap.mmap(-1, max(_INTO // nbytes, 1) * nbytes)) as into, memoryview(into) as view:
            try:
                while time.perf_counter() - start < seconds:
                    place = int(draw.integers(0, (size - nbytes) // _ALIGNMENT + 1)) * _ALIGNMENT
                    to = int(draw.integers(0, len(view) // nbytes)) * nbytes
                    with view[to : to + nbytes] as part:
                        os.preadv(handle, [part], place)
                    if not direct:
                        os.posix_fadvise(handle, place, nbytes, os.POSIX_FADV_DONTNEED)
                    ends.append(time.perf_counter())
            except OSError as error:
                errors.append(error)

    try:
        threads = [threading.Thread(target=read, args=(number,)) for number in range(readers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os.close(handle)
    if errors:
        raise errors[0]
    ends.sort()
    together = 2 * readers  # reads of several threads may end at one moment, so that one alone says nothing
    if len(ends) <= together:
        return (time.perf_counter() - start) / len(ends)
    return float(np.median(np.subtract(ends[together:], ends[:-together]))) / together


def _memory_bandwidth(nbytes: int = 64 << 20, times: int = 5) -> float:
    """Bytes a second of a product of a matrix that no cache holds with a vector, the best of a few."""
    matrix = np.ones((nbytes // 8192, 2048), np.float32)
    vector = np.ones(2048, np.float32)
    best = np.inf
    for _ in range(times):
        start = time.perf_counter()
        matrix @ vector
        best = min(best, time.perf_counter() - start)
    return nbytes / best
