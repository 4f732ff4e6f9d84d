"""Writing a trace: many small, complete parts while the run goes on.

A part is encoded in memory and written by one background thread, so the model does not wait for the disk. The
queue is short: a slow disk slows the run down instead of filling the memory. What the thread runs into is raised in the
next call of the writer.

Legend: N rows (tokens), A assignments of one layer, E experts, G sampled rows, d model width.
"""

from __future__ import annotations

import queue
import re
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collegium.errors import ConfigError, StorageError, TraceError
from collegium.files import PARTIAL, atomic_file
from collegium.trace.schema import META, PHASES, TOKEN_COLUMNS, TraceMeta, arrow_schema, write_meta

if TYPE_CHECKING:
    from collegium.trace.reader import Trace

__all__ = ["PART", "LayerRows", "TraceWriter", "part_files", "remove_trace"]

PART = re.compile(r"part-(\d{8})-([0-9a-f]{8})\.parquet")
"""Name of a part: its number and the CRC-32 of its bytes."""

PART_ROWS = 1 << 14
PART_BYTES = 1 << 26  # a part is closed earlier where rows are wide (logits, gate inputs)

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class LayerRows:
    """What N tokens did in one layer.

    Attributes:
        expert: ``[A]`` expert ids, token-major.
        weight: ``[A]`` combine weights.
        lengths: ``[N]`` assignments of each token; None if every token has A / N.
        logits: ``[N, E]`` router logits, if the trace has them.
        gate_input: ``[G, d]`` router inputs of the sampled tokens, if the trace has them.
        dropped: experts that were chosen but not carried out, token-major; None for none. Left out where the trace has
            no column for them.
        dropped_lengths: ``[N]`` how many of each token; needed with `dropped`.
    """

    expert: Array
    weight: Array
    lengths: Array | None = None
    logits: Array | None = None
    gate_input: Array | None = None
    dropped: Array | None = None
    dropped_lengths: Array | None = None


def part_files(folder: Path) -> list[Path]:
    """The parts of a trace folder in order.

    Raises:
        TraceError: a number is missing or given twice, or a part is not a plain file.
    """
    found = sorted(file for file in folder.iterdir() if PART.fullmatch(file.name))
    for number, file in enumerate(found):
        match = PART.fullmatch(file.name)
        if match is None or int(match[1]) != number:
            raise TraceError(f"{folder}: part {number} is missing or there twice; found {file.name} in its place")
        if file.is_symlink() or not file.is_file():
            raise TraceError(f"{file} is not a plain file")
    return found


def remove_trace(folder: Path) -> None:
    """Delete the trace in `folder`; files that are not part of one stay. Raises StorageError."""
    # meta.json goes first: a folder without it is no trace, so an interrupted removal leaves nothing half readable
    doomed = [folder / META, *(file for file in folder.iterdir() if PART.fullmatch(file.name)), *_stale(folder)]
    try:
        for file in doomed:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"could not delete {error.filename}: {error.strerror}") from error


def _stale(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.name.startswith(PARTIAL) and file.is_file()]


class TraceWriter:
    """Writes a trace; a context manager. Memory stays within a few parts however long the run is.

    Leaving the block normally marks the trace complete. Leaving it by an exception, Ctrl-C too, writes the rows at hand
    and leaves ``complete: false``.

    Args:
        folder: where the trace goes; made if needed.
        meta: description; ``complete``, ``tokens`` and ``parts`` are filled in by the writer.
        resume: the trace in `folder`, to be continued; its meta must agree with `meta`.
        part_rows: rows of a part.
        part_seconds: close a part that holds rows for so long, even if it is short, so that who reads along is not kept
            waiting; None waits for `part_rows`.

    Raises:
        StorageError: a part could not be written; earlier parts stay readable.
        TraceError: `resume` is a trace of something else.
    """

    def __init__(
        self,
        folder: Path,
        meta: TraceMeta,
        *,
        resume: Trace | None = None,
        part_rows: int = PART_ROWS,
        part_seconds: float | None = None,
    ) -> None:
        self.folder, self.part_rows, self.part_seconds = folder, part_rows, part_seconds
        self._begun = 0.0  # when the first of the rows at hand came
        self.schema = arrow_schema(meta)
        self.rows = 0  # in this folder, earlier runs included
        self._parts = 0
        self._batches: list[pa.RecordBatch] = []
        self._held_rows = self._held_bytes = 0
        self._error: BaseException | None = None
        if resume is not None:
            _check_same(resume, meta)
            self._parts, self.rows = len(resume.files), len(resume)
            meta = meta.model_copy(update={"created": resume.meta.created})
            for file in _stale(folder):
                file.unlink(missing_ok=True)
        self.meta = meta.model_copy(update={"complete": False, "tokens": None, "parts": None})
        self._opened = False  # nothing is touched until there is something to add
        self._encoding = _encoding(self.schema)
        self._queue: queue.Queue[pa.Table | None] = queue.Queue(maxsize=2)
        self._thread = threading.Thread(target=self._write_parts, name="trace writer", daemon=True)
        self._thread.start()

    def _open(self) -> None:
        write_meta(self.folder, self.meta)
        self._opened = True

    def add(
        self,
        tokens: Mapping[str, Array],
        layers: Sequence[LayerRows],
        *,
        phase: str = "prefill",
        step: int | Array = 0,
        adapter: str | None = None,
        sampled: Array | None = None,
    ) -> None:
        """Append N rows.

        Args:
            tokens: ``[N]`` whole numbers each: sequence, document, position, token, domain (an index into
                ``meta.domains``), and request if it differs from sequence.
            layers: one `LayerRows` for each of ``meta.layers``, in that order.
            step: forward step of the rows, or ``[N]`` one for each.
            sampled: ``[N]`` bool, which rows have a gate input; needed if the trace has them.
        """
        self._raise_error()
        if phase not in PHASES:
            raise ConfigError(f"phase {phase!r} is none of {', '.join(PHASES)}")
        N = len(tokens["token"])
        if N == 0:
            return
        if not self._opened:
            self._open()
        domains = pa.array(self.meta.domains, pa.string())
        columns: dict[str, pa.Array] = {
            "domain": pa.DictionaryArray.from_arrays(pa.array(tokens["domain"]), domains).dictionary_decode(),
            "step": pa.array(np.full(N, step, np.uint32)),
            "phase": pa.repeat(pa.scalar(phase), N),
            "request": _uint32(tokens.get("request", tokens["sequence"])),
            "adapter": pa.repeat(pa.scalar(adapter, pa.string()), N),
        }
        columns |= {name: _uint32(tokens[name]) for name in ("sequence", "document", "position", "token")}
        for entry, rows in zip(self.meta.layers, layers, strict=True):
            offsets = _offsets(N, rows)
            columns[f"expert_{entry.layer}"] = self._lists(f"expert_{entry.layer}", offsets, rows.expert)
            columns[f"weight_{entry.layer}"] = self._lists(f"weight_{entry.layer}", offsets, rows.weight)
            if f"dropped_{entry.layer}" in self.schema.names:
                columns[f"dropped_{entry.layer}"] = self._lists(f"dropped_{entry.layer}", *_dropped(N, rows))
            if rows.logits is not None:
                columns[f"logits_{entry.layer}"] = self._lists(
                    f"logits_{entry.layer}", np.arange(0, rows.logits.size + 1, rows.logits.shape[1]), rows.logits
                )
            if rows.gate_input is not None:
                assert sampled is not None
                ends = np.concatenate([[0], np.cumsum(sampled)]) * rows.gate_input.shape[1]
                columns[f"gate_input_{entry.layer}"] = self._lists(
                    f"gate_input_{entry.layer}", ends, rows.gate_input, mask=~sampled
                )
        batch = pa.RecordBatch.from_arrays([columns[name] for name in self.schema.names], schema=self.schema)
        if not self._held_rows:
            self._begun = time.monotonic()
        self._batches.append(batch)
        self._held_rows += N
        self._held_bytes += batch.nbytes
        self._flush(everything=self.part_seconds is not None and time.monotonic() - self._begun >= self.part_seconds)

    def _lists(self, name: str, offsets: Array, values: Array, mask: Array | None = None) -> pa.ListArray:
        kind = self.schema.field(name).type
        items = pa.array(values.reshape(-1).astype(kind.value_type.to_pandas_dtype(), copy=False))
        nulls = None if mask is None else pa.array(mask)
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32, copy=False)), items, type=kind, mask=nulls)

    def _flush(self, everything: bool) -> None:
        while self._held_rows and (everything or self._held_rows >= self.part_rows or self._held_bytes >= PART_BYTES):
            table = pa.Table.from_batches(self._batches, self.schema)
            per_row = max(1, self._held_bytes // self._held_rows)
            rows = max(1, min(self.part_rows, PART_BYTES // per_row, self._held_rows))
            rest = table.slice(rows)
            self._queue.put(table.slice(0, rows))  # Ctrl-C while this waits changes nothing yet: close() tries again
            self.rows += rows
            self._batches = rest.to_batches()
            self._held_rows, self._held_bytes = rest.num_rows, rest.nbytes
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_parts(self) -> None:
        while (table := self._queue.get()) is not None:
            if self._error is not None:
                continue  # keep emptying the queue, so that the caller gets to see the error
            try:
                sink = pa.BufferOutputStream()
                pq.write_table(table, sink, **self._encoding)
                content = sink.getvalue()
                name = f"part-{self._parts:08d}-{zlib.crc32(content):08x}.parquet"
                with atomic_file(self.folder / name) as partial:
                    partial.write_bytes(content)
                self._parts += 1
            except BaseException as error:
                self._error = error

    def close(self, *, complete: bool) -> None:
        """Write what is at hand and, if `complete`, mark the trace so. Raises what the thread ran into."""
        try:
            if self._error is None:
                self._flush(everything=True)
        finally:
            self._queue.put(None)
            self._thread.join()
        self._raise_error()
        if complete:
            self.meta = self.meta.model_copy(update={"complete": True, "tokens": self.rows, "parts": self._parts})
            write_meta(self.folder, self.meta)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close(complete=True)
            return
        try:
            self.close(complete=False)
        except StorageError:
            if error is not self._error:
                raise  # the run failed for another reason and its rows could not be kept either


def _uint32(values: Array) -> pa.Array:
    return pa.array(values.astype(np.uint32, copy=False))


def _offsets(N: int, rows: LayerRows) -> Array:
    if rows.lengths is not None:
        return np.concatenate([[0], np.cumsum(rows.lengths)])
    return np.arange(N + 1) * (rows.expert.size // N)


def _dropped(N: int, rows: LayerRows) -> tuple[Array, Array]:
    """``(offsets [N+1], expert)``."""
    if rows.dropped is None:
        return np.zeros(N + 1, np.int32), np.empty(0, np.uint8)
    assert rows.dropped_lengths is not None
    return np.concatenate([[0], np.cumsum(rows.dropped_lengths)]), rows.dropped


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    """Ids compress best as dictionaries, float bytes when split into planes."""
    leaves = {name: f"{name}.list.element" for name in schema.names if name not in TOKEN_COLUMNS}
    ids = [leaf for name, leaf in leaves.items() if name.startswith(("expert_", "dropped_"))]
    floats = [leaf for leaf in leaves.values() if leaf not in ids]
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": [*TOKEN_COLUMNS, *ids],
        "column_encoding": dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
    }


def _check_same(found: Trace, asked: TraceMeta) -> None:
    for field in ("fingerprint", "family", "layers", "tokenizer", "data", "domains", "columns"):
        old, new = getattr(found.meta, field), getattr(asked, field)
        if old != new:
            raise TraceError(
                f"cannot resume {found.folder}: its {field} is {old!r}, this run's is {new!r}; use the same settings, "
                "or record into another folder"
            )
