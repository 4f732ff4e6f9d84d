"""`EventLog`: what happened to every request of an expert, written alike by the simulator and by the engine.

Columns of the Parquet file, one row a request:

    step      uint32    pass, counted as the writer counts them
    layer     uint16    MoE layer, counted from 0
    expert    uint32    id within the layer
    found     uint8     a `Found` code
    evicted   int32     key that gave up its slot, -1 if none did
    bits      uint8     of the copy
    bytes     uint64    read because of this request: 0 unless it was a miss
    waited    float32   seconds that computation stood still for it
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from collegium.errors import TraceError
from collegium.files import atomic_file
from collegium.offload.cache import Found, Request
from collegium.offload.geometry import Array

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["EventLog"]

_CHUNK = 4096  # requests
_COLUMNS = {
    "step": np.uint32,
    "layer": np.uint16,
    "expert": np.uint32,
    "found": np.uint8,
    "evicted": np.int32,
    "bits": np.uint8,
    "bytes": np.uint64,
    "waited": np.float32,
}


def _schema() -> pa.Schema:
    import pyarrow as pa  # 30 MB of an engine's memory, for something it does at the end if at all

    return pa.schema([pa.field(name, pa.from_numpy_dtype(dtype), nullable=False) for name, dtype in _COLUMNS.items()])


class EventLog:
    """Requests in the order they were made."""

    def __init__(self) -> None:
        self._columns: dict[str, Array] = {name: np.empty(0, dtype) for name, dtype in _COLUMNS.items()}
        self._pending: list[tuple[int, Request, int, int]] = []  # not in the columns yet
        self._waited: list[tuple[int, float]] = []
        self._rows = 0
        self._written = 0

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, column: str) -> Array:
        """The values of a column, a view that is of no more use after the next `add`."""
        self._write()
        return self._columns[column][: self._rows]

    def add(self, step: int, request: Request, bits: int, nbytes: int) -> int:
        """Log a request; the row of its first expert.

        Args:
            step: pass that asked.
            bits: of the copies.
            nbytes: of one of them.
        """
        first = self._rows
        self._rows += len(request.experts)
        self._pending.append((step, request, bits, nbytes))
        if len(self._pending) == _CHUNK:
            self._write()
        return first

    def wait(self, row: int, seconds: float) -> None:
        """Computation stood still for the request of this row."""
        self._waited.append((row, seconds))

    def _write(self) -> None:
        """Move what is pending into the columns, which at least double when they are full."""
        if self._pending:
            first, last = self._written, self._rows
            if last > len(self._columns["step"]):
                grown = max(last, 2 * len(self._columns["step"]))
                self._columns = {name: np.resize(values, grown) for name, values in self._columns.items()}
            steps, requests, bits, nbytes = zip(*self._pending, strict=True)
            lengths = [len(request.experts) for request in requests]
            found = np.concatenate([request.found for request in requests])
            values = {
                "step": np.repeat(steps, lengths),
                "layer": np.repeat([request.layer for request in requests], lengths),
                "expert": np.concatenate([request.experts for request in requests]),
                "found": found,
                "evicted": np.concatenate([request.evicted for request in requests]),
                "bits": np.repeat(bits, lengths),
                "bytes": np.repeat(nbytes, lengths) * (found == Found.MISS),
                "waited": 0,
            }
            for name, column in values.items():
                self._columns[name][first:last] = column
            self._written = last
            self._pending.clear()
        for row, seconds in self._waited:
            self._columns["waited"][row] += seconds
        self._waited.clear()

    def save(self, file: Path) -> None:
        """Write the log as Parquet. Raises StorageError."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table([pa.array(self[name]) for name in _COLUMNS], schema=_schema())
        with atomic_file(file) as partial:
            pq.write_table(table, partial, compression="zstd")

    @classmethod
    def load(cls, file: Path) -> EventLog:
        """Read a log.

        Raises:
            TraceError: the file is not readable or not an event log.
        """
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(file)
        except Exception as error:  # foreign bytes; what their parser raises is not ours to list
            raise TraceError(f"{file} is not readable as an event log: {error}") from error
        if table.schema.names != _schema().names or table.schema.types != _schema().types:
            raise TraceError(f"{file} is not an event log: its columns are {', '.join(table.schema.names)}")
        found = cls()
        found._columns = {name: table.column(name).to_numpy().copy() for name in _COLUMNS}
        found._rows = found._written = table.num_rows
        if found._rows and int(found["found"].max()) > max(Found):
            raise TraceError(f"{file} is not an event log: column 'found' holds {int(found['found'].max())}")
        return found
