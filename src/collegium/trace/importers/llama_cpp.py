"""Routing that llama.cpp's moe-trace examples write as CSV. Three layouts are in use, told apart by their columns:

    layer,expert                    one line for each assignment (the example proposed to llama.cpp)
    pos,layer,id,id,...             one line for each token and layer; negative positions are prompt (the tool of forks)
    phase,token,layer,rank,expert   one line for each assignment, with a header line

In each of them a layer's lines are in token order, and layers are numbers of decoder layers. The first layout says
neither K nor phases nor where a sequence ends: K must be known, and all is one prompt. Positions in the second restart
with each batch, so tokens are counted instead. Token ids are in none.

Legend: N tokens, K experts of a token, E experts.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from collegium.errors import ConfigError, TraceError
from collegium.trace.importers.base import (
    EQUAL_WEIGHTS,
    Block,
    Known,
    Recording,
    checked_rows,
    importer,
    layer_entries,
    sequence_columns,
    token_ids,
)
from collegium.trace.schema import LayerMeta

__all__ = ["read_llama_cpp"]

Array = np.ndarray[Any, np.dtype[Any]]

_RANKED = ["phase", "token", "layer", "rank", "expert"]
_PHASES = {"prefill": 0, "prompt": 0, "decode": 1}
_CHUNK = 1 << 14  # rows of a block


@dataclass(eq=False)
class _File:
    """One file: experts of each layer, and what each token is."""

    where: str
    layers: dict[int, Array]  # [N, K]
    decode: Array  # [N] bool
    starts: Array  # [N] bool: the token begins a sequence


@importer("llama.cpp", reads="CSV of moe-trace: layer,expert; pos,layer,id,...; phase,token,layer,rank,expert")
def read_llama_cpp(files: Sequence[Path], known: Known) -> Recording:
    """See the module."""
    notes = [EQUAL_WEIGHTS]
    found = [_read(path, known, notes) for path in files]
    layers = sorted(found[0].layers)
    for one in found:
        if sorted(one.layers) != layers:
            raise TraceError(f"{one.where}: column 'layer' names {sorted(one.layers)}, {found[0].where} {layers}")
    K = max(array.shape[1] for one in found for array in one.layers.values())
    total = layers[-1] + 1
    entries = layer_entries(known, layers, total, f"{found[0].where}: column 'layer'", top_k=K, numbered=True)
    for one in found:
        for layer, entry in zip(layers, entries, strict=True):
            _refuse_rankings(one.layers[layer], entry, one.where)
    token = token_ids(known, sum(len(one.decode) for one in found), notes)
    return Recording(entries, _blocks(found, token, layers, entries), notes=notes)


def _read(path: Path, known: Known, notes: list[str]) -> _File:
    content = path.read_bytes()
    if not content.strip():
        raise TraceError(f"{path} is empty")
    if not content.endswith(b"\n"):
        raise TraceError(f"{path} ends in the middle of a line: it is cut short")
    head = content.split(b"\n", 1)[0].decode(errors="replace").strip()
    names = [name.strip() for name in head.split(",")]
    if names == _RANKED:
        return _ranked(path, content)
    headed = not names[0].lstrip("-").isdigit()
    known_heads = names == ["layer", "expert"] or (names[:2] == ["pos", "layer"] and len(names) > 2)
    if headed and not known_heads:
        advice = "; counts have no tokens, and a trace needs every token" if "count" in names else ""
        raise TraceError(f"{path}: its columns {head!r} are none of the layouts of moe-trace{advice}")
    table = _table(path, content, len(names), headed)
    return _flat(path, table, known, notes) if len(names) == 2 else _rows(path, table)


def _table(path: Path, content: bytes, columns: int, headed: bool) -> Array:
    """``[lines, columns]`` whole numbers."""
    try:
        frame = pl.read_csv(
            io.BytesIO(content),
            has_header=False,
            skip_rows=int(headed),
            schema={f"column {number}": pl.Int64 for number in range(1, columns + 1)},
        )
    except Exception as error:  # foreign bytes; what their parser raises is not ours to list
        raise TraceError(f"{path} must hold {columns} whole numbers a line: {_first_line(error)}") from error
    for name in frame.columns:
        if frame[name].null_count():
            line = int(frame[name].is_null().arg_max() or 0) + 1 + int(headed)
            raise TraceError(f"{path}, line {line}: {name} is missing")
    return frame.to_numpy()


def _flat(path: Path, table: Array, known: Known, notes: list[str]) -> _File:
    layers: dict[int, Array] = {}
    for layer in np.unique(table[:, 0]).tolist():
        entry = known.model.layers.get(layer) if known.model else None
        K = entry.top_k if entry else known.top_k
        if K is None:
            raise ConfigError(f"{path} does not tell how many experts a token has; give --model or --top-k")
        ids = table[table[:, 0] == layer, 1]
        if len(ids) % K:
            raise TraceError(f"{path}: layer {layer} has {len(ids)} lines, no multiple of the {K} experts of a token")
        layers[layer] = ids.reshape(-1, K)
    N = _same_length(path, layers)
    notes.append(f"{path.name} tells no phases and no ends of sequences: it was taken for one prompt")
    return _File(str(path), layers, np.zeros(N, bool), np.arange(N) == 0)


def _rows(path: Path, table: Array) -> _File:
    numbers = np.unique(table[:, 1]).tolist()
    layers = {layer: table[table[:, 1] == layer, 2:] for layer in numbers}
    N = _same_length(path, layers)
    signs = {layer: table[table[:, 1] == layer, 0] >= 0 for layer in numbers}
    decode = signs[numbers[0]]
    for layer in numbers:
        if (signs[layer] != decode).any():
            raise TraceError(f"{path}: column 'pos' of layer {layer} has other phases than that of layer {numbers[0]}")
    starts = np.concatenate([[True], decode[:-1] & ~decode[1:]])  # a prompt after decoding begins anew
    return _File(str(path), layers, decode, starts[:N])


def _ranked(path: Path, content: bytes) -> _File:
    try:
        frame = pl.read_csv(io.BytesIO(content), schema={"phase": pl.String, **dict.fromkeys(_RANKED[1:], pl.Int64)})
    except Exception as error:  # foreign bytes; what their parser raises is not ours to list
        raise TraceError(f"{path} does not fit its header {','.join(_RANKED)}: {_first_line(error)}") from error
    for name in _RANKED:
        if frame[name].null_count():
            line = int(frame[name].is_null().arg_max() or 0) + 2
            raise TraceError(f"{path}, line {line}: column {name!r} misses a value")
    if odd := sorted(set(frame["phase"].unique()) - set(_PHASES)):
        raise TraceError(f"{path}: column 'phase' holds {odd[0]!r}; {', '.join(_PHASES)} are understood")
    decode = (frame["phase"].replace_strict(_PHASES, return_dtype=pl.Int64) == 1).to_numpy()
    token, layer, rank, expert = (frame[name].to_numpy() for name in _RANKED[1:])
    layers: dict[int, Array] = {}
    about: tuple[Array, Array] | None = None  # token numbers and phases, the same in each layer
    for number in np.unique(layer).tolist():
        rows = layer == number
        K = int(rank[rows].max()) + 1
        whole = len(rank[rows]) % K == 0 and (rank[rows].reshape(-1, K) == np.arange(K)).all()
        if not whole or (np.ptp(token[rows].reshape(-1, K), axis=1) != 0).any():
            raise TraceError(f"{path}: column 'rank' of layer {number} must count 0 to {K - 1} for each token in turn")
        layers[number] = expert[rows].reshape(-1, K)
        here = token[rows][::K], decode[rows][::K]
        if about is not None and not all(map(np.array_equal, here, about)):
            raise TraceError(f"{path}: column 'token' of layer {number} is not that of the layers before it")
        about = here
    assert about is not None
    starts = np.concatenate([[True], about[0][1:] <= about[0][:-1]])
    return _File(str(path), layers, about[1], starts)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _same_length(path: Path, layers: dict[int, Array]) -> int:
    lengths = {layer: len(ids) for layer, ids in layers.items()}
    if len(set(lengths.values())) > 1:
        raise TraceError(f"{path}: layers hold different numbers of tokens, so it is cut short or mixed up: {lengths}")
    return next(iter(lengths.values()))


def _refuse_rankings(ids: Array, entry: LayerMeta, where: str) -> None:
    """An early moe-trace read whole rankings of all experts as if they were rows of K: groups of tokens then partition
    the experts, which routing does not."""
    group, rest = divmod(entry.num_experts, ids.shape[1])
    whole = len(ids) // max(group, 1)
    if rest or group < 2 or whole * (entry.num_experts - 1) < 64:  # too little to be sure that it is no chance
        return
    parts = np.sort(ids[: whole * group].reshape(whole, -1), axis=1)
    if (parts == np.arange(entry.num_experts)).all():
        raise TraceError(
            f"{where}: in layer {entry.layer} every {group} tokens use each expert exactly once. These are rankings of "
            "all experts, as an early moe-trace wrote them for prompts, and not routing; record again with a later one"
        )


def _blocks(found: list[_File], token: Array, layers: Sequence[int], entries: tuple[LayerMeta, ...]) -> Iterator[Block]:
    first_sequence = step = done = 0
    for one in found:
        N = len(one.decode)
        sequence = first_sequence + np.cumsum(one.starts) - 1
        begin = np.maximum.accumulate(np.where(one.starts, np.arange(N), 0))
        position = np.arange(N) - begin
        # a prompt is one forward, each generated token another
        fresh = one.decode | one.starts
        steps = step + np.cumsum(fresh) - 1
        changes = np.flatnonzero(one.decode[1:] != one.decode[:-1]) + 1
        cuts = sorted({0, N, *changes.tolist(), *range(0, N, _CHUNK)})
        for begins, ends in pairwise(cuts):
            rows = slice(begins, ends)
            columns = sequence_columns(token[done + begins : done + ends], sequence[rows], position[rows])
            kept = [
                checked_rows(one.layers[layer][rows], entry, f"{one.where}: column 'expert'")
                for layer, entry in zip(layers, entries, strict=True)
            ]
            yield Block(columns, kept, "decode" if one.decode[begins] else "prefill", steps[rows])
        first_sequence, step, done = int(sequence[-1]) + 1, int(steps[-1]) + 1, done + N
