"""SGLang's expert-distribution recorder in per_token mode: one ``.pt`` file a rank.

    {"records": [{"forward_pass_id", "rank", "gatherer_key", "forward_mode", "input_ids" [n], "positions" [n],
                  "extend_seq_lens" [requests] or None, "topk_ids_of_layer" [L, n, 8] padded with -1, ...}, ...],
     "last_physical_to_logical_map": [L, P]}

Ids are physical slots and are mapped back to logical experts. L counts all decoder layers of most models; rows of dense
ones hold -1. Which request a token belongs to is not recorded: a prompt's tokens are told by ``extend_seq_lens``, and
later tokens are joined to the sequence that they continue by position. The files hold no pickled code, and are read as
plain tensors only (``weights_only=True``).

Legend: L rows of layers, P physical slots, n tokens of a forward, K slots a token, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collegium.errors import TraceError
from collegium.trace.importers.base import (
    EQUAL_WEIGHTS,
    Block,
    Known,
    Recording,
    checked_rows,
    importer,
    layer_entries,
    sequence_columns,
    whole_numbers,
)
from collegium.trace.schema import LayerMeta

__all__ = ["MOVED", "is_moved", "load_tensors", "physical_map", "read_sglang"]

Array = np.ndarray[Any, np.dtype[Any]]

_EXTEND, _DECODE, _IDLE = 1, 2, 4  # values of SGLang's ForwardMode
_PER_TOKEN = "record again with --expert-distribution-recorder-mode per_token"
MOVED = "if experts were rearranged while recording, ids before that are wrong: the file has only the last map"
_UNKNOWN_REQUESTS = "requests were not recorded: tokens were joined to sequences by position"


@dataclass(eq=False)
class _Survey:
    """What a first pass over all files finds: used rows, the widest token, E of each row, sequences of each record."""

    used: Array  # [L] bool
    top_k: int
    experts: list[int]  # [L]
    sequences: dict[tuple[int, int], Array]  # (file, record) -> [n]; a record that is not here is left out
    moved: bool  # the map is not the trivial one
    repeated: int
    unsure: int


@importer("sglang", reads="expert-distribution recorder files (.pt), of per_token mode one a rank")
def read_sglang(files: Sequence[Path], known: Known) -> Recording:
    """See the module."""
    found = _survey(files)
    used = np.flatnonzero(found.used).tolist()
    where = f"{files[0]}: field 'topk_ids_of_layer'"
    entries = layer_entries(
        known,
        used,
        len(found.used),
        where,
        top_k=found.top_k,
        num_experts=[found.experts[row] for row in used],
    )
    notes = [EQUAL_WEIGHTS, _UNKNOWN_REQUESTS]
    if found.unsure:
        notes.append(f"{found.unsure} tokens fitted several sequences and were put into the first")
    if found.repeated:
        notes.append(f"{found.repeated} forwards that several ranks recorded alike were taken once")
    if found.moved:
        notes.append(MOVED)
    return Recording(entries, _blocks(files, found, used, entries), notes=notes)


def load_tensors(path: Path) -> dict[str, Any]:
    """A ``torch.save`` file of tensors and plain containers; code in it is refused, not run.

    Raises:
        TraceError: it is damaged, holds anything else, or is no dict.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes; what their parser raises is not ours to list
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TraceError(f"{path} is not a readable file of tensors: {reason}") from error
    if not isinstance(data, dict):
        raise TraceError(f"{path} must hold a dict, not a {type(data).__name__}")
    return data


def _records(path: Path) -> tuple[list[dict[str, Any]], Array]:
    """``(records, map [L, P])`` of one file."""
    data = load_tensors(path)
    if "logical_count" in data:
        raise TraceError(
            f"{path} holds counts ('logical_count'), which import_statistics reads; a trace needs every token: "
            f"{_PER_TOKEN}"
        )
    records = data.get("records")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise TraceError(f"{path}: field 'records' must be a list of dicts")
    if any("topk_ids_of_layer" not in record for record in records):
        raise TraceError(f"{path}: field 'topk_ids_of_layer' is missing, as in per_pass mode: {_PER_TOKEN}")
    return records, physical_map(data, path)


def physical_map(data: dict[str, Any], path: Path) -> Array:
    """``[L, P]`` the logical expert in each slot, from the content of a file.

    Raises:
        TraceError: it is missing, or does not place every expert.
    """
    where = f"{path}: field 'last_physical_to_logical_map'"
    if "last_physical_to_logical_map" not in data:
        raise TraceError(
            f"{where} is missing, without which slots cannot be told apart from experts; record again in one of the "
            "modes stat (counts of experts) or per_token (with the map)"
        )
    table = whole_numbers(data["last_physical_to_logical_map"], where)
    if table.ndim != 2 or not table.size:
        raise TraceError(f"{where} must be [layers, slots], not {list(table.shape)}")
    for row, slots in enumerate(table):
        if not np.array_equal(np.unique(slots), np.arange(slots.max() + 1)):
            raise TraceError(f"{where}: row {row} does not place every expert from 0 to {slots.max()}")
    return table


def is_moved(table: Array) -> bool:
    """Whether ``table [L, P]`` is not the trivial map, of slots taken in turn."""
    return not np.array_equal(table, np.arange(table.shape[1]) % (table.max(1, keepdims=True) + 1))


def _physical(record: dict[str, Any], where: str, layers: int) -> tuple[Array, Array, Array]:
    """``(ids [L, n, K], input_ids [n], positions [n])`` of a record, checked against one another."""
    ids = whole_numbers(record["topk_ids_of_layer"], f"{where}.topk_ids_of_layer'")
    token, position = (whole_numbers(record.get(name), f"{where}.{name}'") for name in ("input_ids", "positions"))
    n = len(token) if token.ndim == 1 else -1
    if ids.ndim != 3 or ids.shape[:2] != (layers, n) or position.shape != (n,):
        raise TraceError(
            f"{where}': topk_ids_of_layer is {list(ids.shape)}, input_ids {list(token.shape)}, positions "
            f"{list(position.shape)}; they must be [{layers}, tokens, slots], [tokens] and [tokens]"
        )
    return ids, token, position


def _survey(files: Sequence[Path]) -> _Survey:
    found: _Survey | None = None
    first_map: Array | None = None
    seen: set[bytes] = set()
    fresh = 0
    for number, path in enumerate(files):
        records, table = _records(path)
        if first_map is None or found is None:
            first_map, L = table, len(table)
            found = _Survey(np.zeros(L, bool), 0, (table.max(1) + 1).tolist(), {}, is_moved(table), 0, 0)
        if not np.array_equal(table, first_map):
            raise TraceError(f"{path}: field 'last_physical_to_logical_map' is not that of {files[0]}")
        chain = _Chain(fresh)
        for place, record in enumerate(records):
            where = f"{path}: field 'records.{place}"
            ids, token, position = _physical(record, where, len(first_map))
            if not len(token):
                continue
            digest = hashlib.blake2b(f"{record.get('forward_pass_id')} {record.get('gatherer_key')}".encode())
            for array in (token, position, ids):
                digest.update(array.tobytes())
            if digest.digest() in seen:
                found.repeated += 1
                continue
            seen.add(digest.digest())
            found.used |= (ids >= 0).any((1, 2))
            found.top_k = max(found.top_k, int((ids >= 0).sum(-1).max(initial=0)))
            found.sequences[number, place] = chain.join(record, position, where)
        fresh = chain.fresh
        found.unsure += chain.unsure
    assert found is not None  # there is at least one file
    if not found.sequences:
        raise TraceError(f"{files[0]}: field 'records' holds no tokens")
    return found


class _Chain:
    """Follows the sequences of one rank, in the order of its batches."""

    def __init__(self, fresh: int) -> None:
        self.fresh, self.unsure = fresh, 0
        self.open: list[list[int]] = []  # [sequence, next position, 1 if it is decoding]

    def join(self, record: dict[str, Any], position: Array, where: str) -> Array:
        """``[n]`` the sequence of each token of a record."""
        mode = record.get("forward_mode")
        if mode == _DECODE:
            lengths, decoding = np.ones(len(position), np.int64), True
        elif mode == _EXTEND:
            lengths, decoding = whole_numbers(record.get("extend_seq_lens"), f"{where}.extend_seq_lens'"), False
            if lengths.ndim != 1 or lengths.sum() != len(position) or (lengths < 0).any():
                raise TraceError(f"{where}.extend_seq_lens' must add up to the {len(position)} tokens of the forward")
        else:
            raise TraceError(
                f"{where}.forward_mode' is {mode!r}; {_EXTEND} (extend) and {_DECODE} (decode) are understood. Record "
                "without speculative decoding and without mixing prefill and decode in a forward"
            )
        starts = (np.cumsum(lengths) - lengths)[lengths > 0]
        lengths = lengths[lengths > 0]
        ends = [self._place(int(position[start]), decoding) for start in starts]
        for entry, start, length in zip(ends, starts, lengths, strict=True):
            run = position[start : start + length]
            if (np.diff(run) != 1).any():
                raise TraceError(f"{where}.positions' must count up by one within a sequence")
            entry[1] = int(run[-1]) + 1
        if decoding:  # every running sequence gets a token in each decode step: those that got none have ended
            self.open = [entry for entry in self.open if not entry[2] or any(entry is end for end in ends)]
        return np.repeat([entry[0] for entry in ends], lengths)

    def _place(self, start: int, decoding: bool) -> list[int]:
        """The sequence that goes on at position `start`: marked as taken by a next position of -1."""
        fitting = [entry for entry in self.open if entry[1] == start] if start else []
        if not decoding and len(fitting) > 1:
            fitting = []  # more likely a prompt whose beginning was cached
        if len(fitting) > 1:
            self.unsure += 1
        if not fitting:
            fitting = [[self.fresh, start, 0]]
            self.fresh += 1
            self.open.append(fitting[0])
        fitting[0][1], fitting[0][2] = -1, int(decoding)
        return fitting[0]


def _blocks(
    files: Sequence[Path], found: _Survey, used: Sequence[int], entries: tuple[LayerMeta, ...]
) -> Iterator[Block]:
    for number, path in enumerate(files):
        records, table = _records(path)
        for place, record in enumerate(records):
            if (number, place) not in found.sequences:
                continue
            where = f"{path}: field 'records.{place}"
            ids, token, position = _physical(record, where, len(table))
            layers = []
            for row, entry in zip(used, entries, strict=True):
                if ids[row].max(initial=-1) >= table.shape[1] or ids[row].min(initial=0) < -1:
                    raise TraceError(
                        f"{where}.topk_ids_of_layer': layer {entry.layer} holds slot {ids[row].max()}, the map has "
                        f"{table.shape[1]}"
                    )
                logical = np.where(ids[row] >= 0, table[row][ids[row]], -1)
                layers.append(checked_rows(logical, entry, f"{where}.topk_ids_of_layer'"))
            phase = "decode" if record["forward_mode"] == _DECODE else "prefill"
            step = record.get("forward_pass_id")
            if not isinstance(step, int) or step < 0:
                raise TraceError(f"{where}.forward_pass_id' must be a whole number, not {step!r}")
            columns = sequence_columns(token, found.sequences[number, place], position)
            yield Block(columns, layers, phase, step)
