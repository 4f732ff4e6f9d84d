"""Reading a trace. Needs neither the model nor torch.

A trace may come from anywhere: the checksum of a part is compared before its bytes are parsed, its schema must be the
one its meta asks for, and expert ids are checked against E before anybody indexes with them.

Legend: N tokens, K slots per token, E experts, L layers, d model width.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collegium.errors import ConfigError, TraceError
from collegium.trace.schema import PHASES, TOKEN_COLUMNS, TraceMeta, arrow_schema, read_meta
from collegium.trace.store import PART, part_files

__all__ = ["Trace", "TracePart"]

Array = np.ndarray[Any, np.dtype[Any]]
_MAX_PART_ROWS = 1 << 24
_OPTIONAL = {"logits": "logits", "gate_input": "gate inputs", "dropped": "dropped assignments"}


class TracePart:
    """Some rows of a trace in memory, with the columns they were read with. Arrays are views where tokens are alike.

    Attributes:
        start: position of the first row in the trace.
    """

    def __init__(self, table: pa.Table, meta: TraceMeta, start: int, where: Path) -> None:
        self.table, self.meta, self.start, self._where = table, meta, start, where

    def __len__(self) -> int:
        return self.table.num_rows

    def experts(self, layer: int) -> Array:
        """``[N, K]`` expert ids of `layer`, uint8 or uint16; unused slots hold the sentinel E.

        K is the layer's top_k, or more where a token has more. A layer of several iterations has the slots of all of
        them, one after another, and may name an expert once in each.

        Raises:
            TraceError: an id is not below E.
        """
        offsets, values = self.assignments(layer)
        entry = self.meta.layer(layer)
        return _dense(offsets, values, entry.top_k, entry.num_experts)

    def weights(self, layer: int) -> Array:
        """``[N, K]`` float16 combine weights of `layer`, 0 in unused slots."""
        offsets, values = self._lists(f"weight_{layer}")
        return _dense(offsets, values, self.meta.layer(layer).top_k, 0)

    def assignments(self, layer: int) -> tuple[Array, Array]:
        """``(offsets [N+1], expert [A])``: the experts of token i are ``expert[offsets[i]:offsets[i+1]]``.

        Raises:
            TraceError: an id is not below E.
        """
        return self._ids("expert", layer)

    def dropped(self, layer: int) -> tuple[Array, Array]:
        """``(offsets [N+1], expert [A])``: the experts each token chose but did not get, because of a capacity limit.

        Raises:
            TraceError: they were not recorded, or an id is not below E.
        """
        self._need("dropped")
        return self._ids("dropped", layer)

    def logits(self, layer: int) -> Array:
        """``[N, E]`` float16 router logits of `layer`. Raises TraceError if they were not recorded."""
        self._need("logits")
        offsets, values = self._lists(f"logits_{layer}")
        E = self.meta.layer(layer).num_experts
        if (np.diff(offsets) != E).any():
            raise TraceError(f"{self._where}: column 'logits_{layer}' must hold {E} values a token")
        return values.reshape(len(self), E)

    def gate_inputs(self, layer: int) -> tuple[Array, Array]:
        """``(row [G], x [G, d])``: positions in the trace of the sampled tokens, and the router's float32 inputs."""
        self._need("gate_input")
        column = self._column(f"gate_input_{layer}")
        rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        offsets, values = _split(column.drop_null())
        if len(set(np.diff(offsets).tolist())) > 1:
            raise TraceError(f"{self._where}: column 'gate_input_{layer}' holds inputs of several widths")
        return rows + self.start, values.reshape(len(rows), -1)

    def column(self, name: str) -> Array:
        """``[N]`` values of a token column. Domains and phases come as indices into ``meta.domains`` and `PHASES`."""
        if name not in TOKEN_COLUMNS:
            raise ConfigError(f"{name!r} is no token column; they are {', '.join(TOKEN_COLUMNS)}")
        column = self._column(name)
        names = {"domain": self.meta.domains, "phase": PHASES}.get(name)
        if names is None:
            return column.to_numpy(zero_copy_only=column.null_count == 0 and name != "adapter")
        codes = pc.index_in(column, pa.array(names, pa.string()))
        if codes.null_count:
            raise TraceError(f"{self._where}: column {name!r} holds a name that is none of {', '.join(names)}")
        return codes.to_numpy()

    def _need(self, kind: str) -> None:
        if not any(name.startswith(f"{kind}_") for name in self.meta.columns):
            raise TraceError(f"this trace was recorded without {_OPTIONAL[kind]}")

    def _ids(self, kind: str, layer: int) -> tuple[Array, Array]:
        name = f"{kind}_{layer}"
        offsets, values = self._lists(name)
        E = self.meta.layer(layer).num_experts
        if values.size and int(values.max()) >= E:
            raise TraceError(f"{self._where}: column {name!r} holds expert {int(values.max())} of only {E}")
        return offsets, values

    def _lists(self, name: str) -> tuple[Array, Array]:
        return _split(self._column(name))

    def _column(self, name: str) -> pa.Array:
        if name not in self.table.column_names:
            layer = int(name.rpartition("_")[2])
            self.meta.layer(layer)  # names the layers there are
            raise ConfigError(f"column {name!r} was not read; name it in iter_parts()")
        column = self.table.column(name)
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


class Trace:
    """A recorded run, opened by `Trace.open`. See `collegium.trace.schema` for its columns.

    Attributes:
        folder: where it is.
        meta: what was traced and how.
        files: its parts.
    """

    def __init__(self, folder: Path, meta: TraceMeta, files: list[Path], verify: bool) -> None:
        self.folder, self.meta, self.files = folder, meta, files
        self._schema = arrow_schema(meta)
        self._verify = verify
        self._rows: dict[int, int] = {}  # part -> its rows; a part gets here once it is checked

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, verify: bool = True) -> Trace:
        """Open a trace folder; one that is still being written, too.

        Args:
            verify: compare the checksum of each part before its first use.

        Raises:
            TraceError: no trace, or a damaged one; names the file and the field.
        """
        folder = Path(folder)
        meta = read_meta(folder)
        files = part_files(folder)
        if meta.complete and meta.parts != len(files):
            raise TraceError(f"{folder}: field 'parts' of its meta is {meta.parts}, the folder holds {len(files)}")
        return cls(folder, meta, files, verify)

    @property
    def layers(self) -> list[int]:
        """Decoder layers that were traced."""
        return [entry.layer for entry in self.meta.layers]

    def __len__(self) -> int:
        if self.meta.complete and self.meta.tokens is not None:
            return self.meta.tokens
        return sum(self._check(number) for number in range(len(self.files)))

    def __repr__(self) -> str:
        state = "complete" if self.meta.complete else "incomplete"
        return f"Trace({str(self.folder)!r}, {self.meta.family}, {len(self.layers)} layers, {state})"

    def scan(self) -> pl.LazyFrame:
        """All columns as a polars LazyFrame, one row a token."""
        for number in range(len(self.files)):
            self._check(number)
        if not self.files:
            frame = pl.from_arrow(self._schema.empty_table())
            assert isinstance(frame, pl.DataFrame)
            return frame.lazy()
        return pl.scan_parquet(self.files, glob=False)

    def iter_parts(self, columns: Sequence[str] | None = None) -> Iterator[TracePart]:
        """The trace part by part, in order; memory stays within one part.

        Args:
            columns: names of those to read, such as ``["domain", "expert_3"]``; None reads all.

        Raises:
            TraceError: a part is damaged or does not fit the meta.
        """
        for name in columns or ():
            if name not in self._schema.names:
                raise ConfigError(f"{name!r} is no column of this trace; they are {', '.join(self._schema.names)}")
        start = 0
        for number, file in enumerate(self.files):
            rows = self._check(number)
            try:
                table = pq.ParquetFile(file).read(columns=list(columns) if columns else None)
            except Exception as error:  # foreign bytes; what their parser raises is not ours to list
                raise TraceError(f"{file} is not readable: {error}") from error
            yield TracePart(table, self.meta, start, file)
            start += rows
        if self.meta.complete and start != self.meta.tokens:
            raise TraceError(f"{self.folder}: field 'tokens' of its meta is {self.meta.tokens}, its parts hold {start}")

    def experts(self, layer: int) -> Array:
        """``[N, K]`` expert ids of `layer` over the whole trace; see `TracePart.experts`."""
        entry = self.meta.layer(layer)
        parts = [part.experts(layer) for part in self.iter_parts([f"expert_{layer}"])]
        return _stack(parts, entry.num_experts) if parts else np.empty((0, entry.top_k), np.uint8)

    def weights(self, layer: int) -> Array:
        """``[N, K]`` float16 combine weights of `layer` over the whole trace, 0 in unused slots."""
        entry = self.meta.layer(layer)
        parts = [part.weights(layer) for part in self.iter_parts([f"weight_{layer}"])]
        return _stack(parts, 0) if parts else np.empty((0, entry.top_k), np.float16)

    def column(self, name: str) -> Array:
        """``[N]`` values of a token column over the whole trace; see `TracePart.column`."""
        if name not in TOKEN_COLUMNS:
            raise ConfigError(f"{name!r} is no token column; they are {', '.join(TOKEN_COLUMNS)}")
        parts = [part.column(name) for part in self.iter_parts([name])]
        return np.concatenate(parts) if parts else np.empty(0, np.uint32)

    def tokens(self) -> Array:
        """``[N]`` uint32 token ids."""
        return self.column("token")

    def documents(self) -> Array:
        """``[N]`` uint32: the document of each token."""
        return self.column("document")

    def groups(self, by: str) -> list[Any]:
        """The values that `counts` groups by, in the order of its first axis."""
        if by in ("domain", "phase"):
            return list(self.meta.domains if by == "domain" else PHASES)
        seen: set[Any] = set()
        for part in self.iter_parts([by]):
            seen.update(np.unique(part.column(by)).tolist() if by != "adapter" else part.column(by).tolist())
        return sorted(seen, key=lambda value: (value is not None, value))

    def counts(self, layer: int | None = None, by: str | None = None) -> Array:
        """Assignments per expert, int64, streamed.

        Args:
            layer: one layer, or None for all.
            by: a token column ("domain", "phase", "document", ...) to count apart; `groups` gives its values.

        Returns:
            ``[E]`` of one layer, ``[L, E]`` of all (E is then the largest; experts a layer lacks count 0). With `by`
            another axis comes first.
        """
        return self._counts(TracePart.assignments, "expert", layer, by)

    def dropped_counts(self, layer: int | None = None, by: str | None = None) -> Array:
        """Assignments per expert that a capacity limit dropped; arguments and result are those of `counts`.

        Raises:
            TraceError: they were not recorded.
        """
        if not self.meta.has("dropped"):
            raise TraceError(f"{self.folder} was recorded without dropped assignments; record with --dropped")
        return self._counts(TracePart.dropped, "dropped", layer, by)

    def _counts(
        self, read: Callable[[TracePart, int], tuple[Array, Array]], kind: str, layer: int | None, by: str | None
    ) -> Array:
        layers = self.layers if layer is None else [layer]
        sizes = [self.meta.layer(number).num_experts for number in layers]
        groups = [None] if by is None else self.groups(by)
        total = np.zeros((len(groups), len(layers), max(sizes)), np.int64)
        columns = [f"{kind}_{number}" for number in layers] + ([by] if by else [])
        for part in self.iter_parts(columns):
            codes = None if by is None else _codes(part.column(by), groups, by)
            for row, (number, E) in enumerate(zip(layers, sizes, strict=True)):
                offsets, expert = read(part, number)
                if codes is not None:
                    expert = np.repeat(codes, np.diff(offsets)) * E + expert
                found = np.bincount(expert, minlength=len(groups) * E)
                total[:, row, :E] += found.reshape(len(groups), E)
        squeezed = total[:, 0] if layer is not None else total
        return squeezed[0] if by is None else squeezed

    def _check(self, number: int) -> int:
        """Rows of a part. The first time its bytes are compared with their checksum and its schema with the meta."""
        if number not in self._rows:
            file = self.files[number]
            try:
                source: Any = file
                if self._verify:
                    content = file.read_bytes()
                    match = PART.fullmatch(file.name)
                    if match is None or int(match[2], 16) != zlib.crc32(content):
                        raise TraceError(f"{file}: its bytes do not fit the checksum in its name; the part is damaged")
                    source = pa.BufferReader(content)
                found = pq.ParquetFile(source)
                schema, footer = found.schema_arrow, found.metadata
            except TraceError:
                raise
            except Exception as error:  # foreign bytes; what their parser raises is not ours to list
                raise TraceError(f"{file} is not readable: {error}") from error
            self._check_schema(file, schema)
            if footer.num_rows > _MAX_PART_ROWS:
                raise TraceError(f"{file} claims {footer.num_rows} rows; the limit is {_MAX_PART_ROWS}")
            self._rows[number] = footer.num_rows
        return self._rows[number]

    def _check_schema(self, file: Path, schema: pa.Schema) -> None:
        if schema.names != self._schema.names:
            odd = sorted(set(schema.names) ^ set(self._schema.names)) or schema.names
            raise TraceError(f"{file}: its columns are not those of the meta: {', '.join(odd[:5])}")
        for found, asked in zip(schema, self._schema, strict=True):
            if found.type != asked.type or found.nullable != asked.nullable:
                raise TraceError(f"{file}: column {found.name!r} is {found}, the meta asks for {asked}")


def _split(column: pa.ListArray) -> tuple[Array, Array]:
    """``(offsets [N+1] from 0, values)``; views of the column where it has no nulls."""
    offsets = column.offsets.to_numpy()
    return offsets - offsets[0] if len(offsets) and offsets[0] else offsets, column.flatten().to_numpy()


def _stack(parts: list[Array], fill: int) -> Array:
    if len(parts) == 1:
        return parts[0]
    widths = {part.shape[1] for part in parts}
    kinds = [part.dtype for part in parts] + ([np.min_scalar_type(fill)] if len(widths) > 1 else [])
    out = np.full((sum(map(len, parts)), max(widths)), fill, np.result_type(*kinds))
    row = 0
    for part in parts:
        out[row : row + len(part), : part.shape[1]] = part
        row += len(part)
    return out


def _dense(offsets: Array, values: Array, top_k: int, fill: int) -> Array:
    lengths = np.diff(offsets)
    K = max(top_k, int(lengths.max(initial=0)))
    if lengths.min(initial=K) == K:
        return values.reshape(-1, K)
    dtype = np.result_type(values.dtype, np.min_scalar_type(fill)) if fill else values.dtype
    out = np.full((len(lengths), K), fill, dtype)
    out[np.arange(K) < lengths[:, None]] = values
    return out


def _codes(values: Array, groups: list[Any], by: str) -> Array:
    if by in ("domain", "phase"):
        return values.astype(np.int64)
    if by == "adapter":
        place = {value: code for code, value in enumerate(groups)}
        return np.array([place[value] for value in values.tolist()], np.int64)
    return np.searchsorted(np.asarray(groups), values)
