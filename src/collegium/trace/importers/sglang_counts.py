"""SGLang's expert-distribution recorder in its modes without tokens.

    stat, stat_approx: {"rank": 0, "logical_count" [steps, L, E], "average_utilization_rate_over_window"}
    per_pass:          {"records": [{"forward_pass_id", "rank", "gatherer_key", "global_physical_count" [L, P]}, ...],
                        "last_physical_to_logical_map": [L, P]}, a file a rank

A stat file is a buffer of forward passes, summed over ranks, of which the unused ones are zero; a dump empties it, so
that several files are added up. Counts of physical slots are summed to logical experts by the map of the file. Rows of
dense layers are zero.

Legend: L rows of layers, P physical slots, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from collegium.errors import TraceError
from collegium.trace.importers.base import Known, layer_entries, whole_numbers
from collegium.trace.importers.counts import Counted, counter
from collegium.trace.importers.sglang import MOVED, is_moved, load_tensors, physical_map

__all__ = ["count_sglang"]

Array = np.ndarray[Any, np.dtype[Any]]

_STAT = frozenset({"rank", "logical_count", "average_utilization_rate_over_window"})
_PER_PASS = frozenset({"forward_pass_id", "rank", "gatherer_key", "global_physical_count"})
_ALIKE = "several ranks may have counted the same tokens: shares are not changed by that, numbers of tokens are"
_UNSURE = "the file does not say whether counts are exact (stat) or approximate (stat_approx)"


@counter("sglang")
def count_sglang(files: Sequence[Path], known: Known) -> Counted | None:
    """See the module. None for files of per_token mode."""
    first = load_tensors(files[0])
    if "logical_count" in first:
        counts, sizes, notes = _stat(files)
        field = "logical_count"
    elif _is_per_pass(first):
        counts, sizes, notes = _per_pass(files)
        field = "records"
    else:
        return None
    used = np.flatnonzero([row.any() for row in counts]).tolist()
    where = f"{files[0]}: field {field!r}"
    if not used:
        raise TraceError(f"{where} counts nothing: no forward pass was recorded")
    entries = layer_entries(known, used, len(counts), where, top_k=None, num_experts=[sizes[row] for row in used])
    found = sorted(zip(entries, (counts[row] for row in used), strict=True), key=lambda pair: pair[0].layer)
    return Counted(
        layers=tuple(entry for entry, _ in found),
        counts=tuple(row for _, row in found),
        total=len(counts),
        notes=tuple(notes),
    )


def _stat(files: Sequence[Path]) -> tuple[list[Array], list[int], list[str]]:
    """``(counts [E] of each row, E of each row, notes)`` of stat files."""
    total: Array | None = None
    passes, full, odd = 0, False, set[str]()
    ranks: dict[Any, Path] = {}
    seen: dict[bytes, Path] = {}
    for path in files:
        data = load_tensors(path)
        if "logical_count" not in data:
            raise TraceError(f"{path}: field 'logical_count' is missing, which {files[0]} has; import them apart")
        where = f"{path}: field 'logical_count'"
        steps = whole_numbers(data["logical_count"], where)
        steps = steps[None] if steps.ndim == 2 else steps
        if steps.ndim != 3 or not steps.size or (steps < 0).any():
            raise TraceError(
                f"{where} must be counts [steps, layers, experts], not {list(steps.shape)} with {_low(steps)}"
            )
        if total is not None and steps.shape[1:] != total.shape:
            raise TraceError(
                f"{where} is of {list(steps.shape[1:])} layers and experts, {files[0]} of {list(total.shape)}"
            )
        digest = hashlib.blake2b(steps.tobytes()).digest()
        if digest in seen:
            raise TraceError(f"{where} is that of {seen[digest]}: the same dump twice would count twice")
        seen[digest] = path
        ranks.setdefault(data.get("rank"), path)
        used = int(np.count_nonzero(steps.reshape(len(steps), -1).max(1)))
        passes, full = passes + used, full or used == len(steps) > 1
        odd |= data.keys() - _STAT
        total = steps.sum(0) if total is None else total + steps.sum(0)
    if len(ranks) > 1:
        names = ", ".join(f"{path} (rank {rank})" for rank, path in ranks.items())
        raise TraceError(
            f"{names}: field 'rank' differs, and counts of stat mode are summed over ranks: give one of them"
        )
    assert total is not None  # there is at least one file
    notes = [f"counts of {passes:,} forward passes, without their tokens", _UNSURE, _ALIKE]
    if full:
        notes.append(
            "every pass of the buffer is used, so that earlier ones may have been overwritten; "
            "--expert-distribution-recorder-buffer-size -1 keeps all"
        )
    return list(total), [total.shape[1]] * len(total), notes + _left_out(odd)


def _is_per_pass(data: dict[str, Any]) -> bool:
    records = data.get("records")
    return (
        isinstance(records, list)
        and bool(records)
        and all(isinstance(record, dict) and "topk_ids_of_layer" not in record for record in records)
        and "global_physical_count" in records[0]
    )


def _per_pass(files: Sequence[Path]) -> tuple[list[Array], list[int], list[str]]:
    """``(counts [E] of each row, E of each row, notes)`` of per_pass files."""
    total: Array | None = None
    first_map: Array | None = None
    passes, repeated, odd = set[Any](), 0, set[str]()
    seen: dict[bytes, int] = {}
    for number, path in enumerate(files):
        data = load_tensors(path)
        if not _is_per_pass(data):
            raise TraceError(f"{path}: field 'records' holds no counts of per_pass mode, which {files[0]} has")
        table = physical_map(data, path)
        if total is None or first_map is None:
            first_map, total = table, np.zeros(table.shape, np.int64)
        if not np.array_equal(table, first_map):
            raise TraceError(f"{path}: field 'last_physical_to_logical_map' is not that of {files[0]}")
        for place, record in enumerate(data["records"]):
            where = f"{path}: field 'records.{place}.global_physical_count'"
            counts = whole_numbers(record.get("global_physical_count"), where)
            if counts.shape != table.shape or (counts < 0).any():
                raise TraceError(
                    f"{where} must be counts {list(table.shape)}, not {list(counts.shape)} with {_low(counts)}"
                )
            odd |= record.keys() - _PER_PASS
            key = f"{record.get('forward_pass_id')} {record.get('gatherer_key')}"
            digest = hashlib.blake2b(key.encode() + counts.tobytes()).digest()
            # ranks without expert parallelism all see every token
            if seen.setdefault(digest, number) != number:
                repeated += 1
                continue
            passes.add(key)
            total += counts
    assert total is not None
    assert first_map is not None
    sizes = (first_map.max(1) + 1).tolist()
    logical = [
        np.bincount(slots, counts, E).astype(np.int64) for slots, counts, E in zip(first_map, total, sizes, strict=True)
    ]
    notes = [f"counts of {len(passes):,} forward passes, without their tokens"]
    if repeated:
        notes.append(f"{repeated} counts that several ranks recorded alike were taken once")
    if is_moved(first_map):
        notes.append(MOVED)
    return logical, sizes, notes + _left_out(odd)


def _low(counts: Array) -> str:
    return f"a lowest value of {int(counts.min())}" if counts.size else "no value"


def _left_out(fields: set[str]) -> list[str]:
    return [f"not understood and left out: field {', '.join(map(repr, sorted(fields)))}"] if fields else []
