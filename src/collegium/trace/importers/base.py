"""What all importers share: what is known beside the files, how recorded layers get their numbers, and the writing.

Legend: N tokens, L layers the file has values for, K slots per token, E experts, A assignments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from collegium._version import __version__
from collegium.errors import ConfigError, TraceError
from collegium.models.checkpoint import open_checkpoint
from collegium.models.families import lookup
from collegium.models.summary import summarize
from collegium.trace.reader import Trace
from collegium.trace.run import check_target
from collegium.trace.schema import META, LayerMeta, TraceMeta, column_names
from collegium.trace.store import LayerRows, TraceWriter, remove_trace

__all__ = [
    "EQUAL_WEIGHTS",
    "IMPORTERS",
    "Block",
    "Importer",
    "Known",
    "ModelFacts",
    "Recording",
    "checked_files",
    "checked_rows",
    "import_trace",
    "importer",
    "layer_entries",
    "read_model_facts",
    "sequence_columns",
    "token_ids",
    "whole_numbers",
    "write_recording",
]

Array = np.ndarray[Any, np.dtype[Any]]

EQUAL_WEIGHTS = "combine weights were not recorded: all experts of a token have the same"
NO_TOKENS = "token ids were not recorded and are all 0: measures by token id say nothing"


@dataclass(frozen=True)
class ModelFacts:
    """What a model's config and headers say about its MoE layers.

    Attributes:
        layers: number of the decoder layer -> its entry.
        num_layers: decoder layers, dense ones included.
        hidden_size, intermediate_size: d, and f of an expert; 0 where config and headers do not tell.
    """

    name: str
    family: str
    fingerprint: str | None
    layers: dict[int, LayerMeta]
    num_layers: int
    hidden_size: int = 0
    intermediate_size: int = 0


@dataclass(frozen=True, eq=False)
class Known:
    """What is known beside the recorded files; every field may be left out if the format tells.

    Attributes:
        model: facts of the model that was recorded.
        network: the model itself; only "router-logits" uses it, to route exactly as its gates do.
        layers: numbers of the decoder layers that the file has values for, in the file's order.
        num_experts, top_k: E and K of every layer.
        tokens: ``[N]`` token ids of all rows in the order of the files.
    """

    model: ModelFacts | None = None
    network: Any = None
    layers: tuple[int, ...] | None = None
    num_experts: int | None = None
    top_k: int | None = None
    tokens: Array | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """Rows to store: token columns (see `TraceWriter.add`), phase, forward steps, and one `LayerRows` a layer."""

    tokens: dict[str, Array]
    layers: list[LayerRows]
    phase: str
    step: int | Array


@dataclass(eq=False)
class Recording:
    """What an importer found; `blocks` is read once."""

    layers: tuple[LayerMeta, ...]
    blocks: Iterator[Block]
    logits: bool = False
    notes: list[str] = field(default_factory=list)


class Reader(Protocol):
    """The function of one format."""

    def __call__(self, files: Sequence[Path], known: Known, /) -> Recording: ...


@dataclass(frozen=True)
class Importer:
    """One format. `reads` says in words what its files are."""

    name: str
    reads: str
    read: Reader


IMPORTERS: dict[str, Importer] = {}
"""Name -> importer; filled by `importer`."""

R = TypeVar("R", bound=Callable[[Sequence[Path], Known], Recording])


def importer(name: str, reads: str) -> Callable[[R], R]:
    """Put a reader into `IMPORTERS`."""

    def register(function: R) -> R:
        IMPORTERS[name] = Importer(name, reads, function)
        return function

    return register


def import_trace(
    format: str,
    files: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    known: Known | None = None,
    *,
    overwrite: bool = False,
) -> tuple[Trace, list[str]]:
    """Read `files` of a format into a trace at `out`.

    Returns:
        The trace, and notes on what the format does not record or what was left out (they are in ``meta.data`` too).

    Raises:
        ConfigError: no such format, no files, or something must be known that is not.
        TraceError: a file is damaged or not of that format, and names it and the field; or `out` holds a trace.
    """
    paths, known, out = checked_files(format, files), known or Known(), Path(out)
    check_target(out, resume=False, overwrite=overwrite)
    recording = IMPORTERS[format].read(paths, known)
    return write_recording(recording, out, known, f"{format}: {', '.join(path.name for path in paths)}")


def checked_files(format: str, files: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """`files` as paths, after a look whether the format is known and they are there.

    Raises:
        ConfigError: no such format, or no files.
        TraceError: one is not a file.
    """
    if format not in IMPORTERS:
        raise ConfigError(f"no importer is named {format!r}; there are {', '.join(sorted(IMPORTERS))}")
    paths = [Path(file) for file in files]
    if not paths:
        raise ConfigError("name at least one file to import")
    for path in paths:
        if not path.is_file():
            raise TraceError(f"{path} is not a file")
    return paths


def write_recording(recording: Recording, out: Path, known: Known, source: str) -> tuple[Trace, list[str]]:
    """Write what an importer found to `out`, in place of a trace that is there; nothing of it stays after an error."""
    entries = tuple(sorted(recording.layers, key=lambda entry: entry.layer))
    order = [recording.layers.index(entry) for entry in entries]
    model = known.model
    meta = TraceMeta(
        model=model.name if model else "unknown",
        fingerprint=model.fingerprint if model else None,
        family=model.family if model else "unknown",
        layers=entries,
        data=". ".join([f"imported from {source}", *recording.notes]),
        domains=("unknown",),
        columns=column_names([entry.layer for entry in entries], logits=recording.logits, gate_inputs=False),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        collegium=__version__,
    )
    if (out / META).exists():
        remove_trace(out)
    N = 0
    try:
        with TraceWriter(out, meta) as writer:
            for block in recording.blocks:
                N += len(block.tokens["token"])
                layers = [block.layers[place] for place in order]
                writer.add(block.tokens, layers, phase=block.phase, step=block.step)
            if not N:
                raise TraceError(f"{source}: there are no tokens in it")
    except BaseException:
        if (out / META).exists():
            remove_trace(out)
        raise
    return Trace.open(out), recording.notes


def read_model_facts(folder: str | os.PathLike[str], name: str | None = None) -> ModelFacts:
    """The facts of a model folder, from its config and headers; weights need not be there.

    Raises:
        CheckpointError: it is not a model folder.
        ConfigError: E or K of a layer is not known, or the model has several stacks of MoE layers.
    """
    checkpoint = open_checkpoint(Path(folder))
    summary = summarize(checkpoint)
    layers: dict[int, LayerMeta] = {}
    for found in summary.moe_layers:
        path = f"{found.stack}.{found.layer}"
        if found.num_experts is None or found.top_k is None:
            raise ConfigError(
                f"{folder}: E or K of {path} is in neither config nor headers; leave out --model and say "
                "--num-experts and --top-k"
            )
        if found.layer in layers:
            raise ConfigError(f"{folder}: layer {found.layer} is in several stacks; a trace has one stream of tokens")
        layers[found.layer] = LayerMeta(
            layer=found.layer,
            path=path,
            num_experts=found.num_experts,
            top_k=found.top_k,
            score=summary.score or "unknown",
        )
    complete = bool(checkpoint.tensors) and not checkpoint.missing
    hidden_size = lookup(checkpoint.config, "hidden_size")
    return ModelFacts(
        name=name or str(folder),
        family=summary.family,
        fingerprint=checkpoint.fingerprint if complete else None,
        layers=layers,
        num_layers=summary.num_layers,
        hidden_size=hidden_size if isinstance(hidden_size, int) else 0,
        intermediate_size=summary.expert_width or 0,
    )


def layer_entries(
    known: Known,
    used: Sequence[int],
    total: int,
    where: str,
    *,
    top_k: int | None,
    num_experts: Sequence[int] | None = None,
    numbered: bool = False,
) -> tuple[LayerMeta, ...]:
    """The decoder layers that a file's rows of values are for.

    Args:
        used: rows (of `total`) that hold routing; rows of dense layers do not.
        where: file and field, for messages.
        top_k: K that the file shows, if it does.
        num_experts: E of each used row, if the file tells.
        numbered: the rows are numbers of decoder layers already.

    Raises:
        TraceError: layers are missing, or the file and the model disagree.
        ConfigError: E or K is known from nowhere.
    """
    numbers = _numbers(known, used, total, where, numbered)
    entries = []
    for place, number in enumerate(numbers):
        found = known.model.layers[number] if known.model else None
        E = found.num_experts if found else known.num_experts or (num_experts[place] if num_experts else None)
        K = found.top_k if found else known.top_k or top_k
        if E is None or K is None:
            missing = "number of experts" if E is None else "number of experts per token"
            option = "--num-experts" if E is None else "--top-k"
            raise ConfigError(f"{where} does not tell the {missing}; give the model (--model) or say {option}")
        if num_experts and num_experts[place] != E:
            raise TraceError(f"{where}: layer {number} has {num_experts[place]} experts there, not {E}")
        if top_k is not None and top_k > K:
            raise TraceError(f"{where}: layer {number} has {top_k} experts a token there, not {K}")
        path, score = (found.path, found.score) if found else (f"layers.{number}", "unknown")
        entries.append(LayerMeta(layer=number, path=path, num_experts=E, top_k=K, score=score))
    return tuple(entries)


def _numbers(known: Known, used: Sequence[int], total: int, where: str, numbered: bool) -> list[int]:
    model = None if known.model is None else sorted(known.model.layers)
    if known.layers is not None:
        if len(known.layers) != len(used):
            raise TraceError(f"{where} holds {len(used)} layers with routing, not the {len(known.layers)} of --layers")
        numbers = list(known.layers)
    elif model is None or numbered or (known.model is not None and total == known.model.num_layers):
        numbers = list(used)
    elif len(used) == len(model):
        numbers = model
    else:
        raise TraceError(f"{where} holds {len(used)} layers with routing, the model has {len(model)} MoE layers")
    if len(set(numbers)) != len(numbers):
        raise ConfigError(f"layers {numbers} repeat a number")
    if model is not None:
        if unknown := sorted(set(numbers) - set(model)):
            raise TraceError(f"{where}: layers {unknown} are no MoE layers of the model; those are {model}")
        if known.layers is None and (missing := sorted(set(model) - set(numbers))):
            raise TraceError(
                f"{where}: layers {missing} are missing; if they were not recorded, name those that were (--layers)"
            )
    return numbers


def checked_rows(ids: Any, entry: LayerMeta, where: str) -> LayerRows:
    """Rows of one layer from expert ids ``[N, K]``, -1 in unused slots; weights are equal.

    Raises:
        TraceError: not whole numbers, an id that is no expert, an expert twice in a token, a token without any.
    """
    ids = whole_numbers(ids, where)
    if ids.ndim != 2:
        raise TraceError(f"{where} must be [tokens, experts per token], not {list(ids.shape)}")
    if ids.size and (ids.max() >= entry.num_experts or ids.min() < -1):
        bad = ids.max() if ids.max() >= entry.num_experts else ids.min()
        raise TraceError(f"{where}: layer {entry.layer} holds expert {bad} of only {entry.num_experts}")
    order = np.sort(ids, axis=1)
    twice = ((order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)).any(1)
    if twice.any():
        row = int(twice.argmax())
        raise TraceError(f"{where}: layer {entry.layer} names an expert twice for token {row}: {ids[row].tolist()}")
    used = ids >= 0
    lengths = used.sum(1)
    if len(ids) and not lengths.all():
        raise TraceError(f"{where}: layer {entry.layer} has no expert for token {int((lengths == 0).argmax())}")
    weight = np.repeat(1 / np.maximum(lengths, 1), lengths).astype(np.float16)
    return LayerRows(ids[used], weight, None if used.all() else lengths)


def whole_numbers(values: Any, where: str) -> Array:
    """`values` as an int64 array.

    Raises:
        TraceError: they are ragged, or not whole numbers.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:  # ragged lists, types numpy does not have
        raise TraceError(f"{where} is not a regular array: {error}") from error
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    if not array.size and array.dtype.kind == "f":
        return array.astype(np.int64)
    nan = array.dtype.kind == "f" and bool(np.isnan(array).any())
    raise TraceError(f"{where} must be whole numbers, not {array.dtype}{' with NaN' if nan else ''}")


def token_ids(known: Known, N: int, notes: list[str]) -> Array:
    """``[N]`` the ids given beside the files; zeros and a note if there are none.

    Raises:
        TraceError: they are not N.
    """
    if known.tokens is None:
        notes.append(NO_TOKENS)
        return np.zeros(N, np.int64)
    if len(known.tokens) != N:
        raise TraceError(f"{len(known.tokens)} token ids were given (--tokens), the files hold {N} tokens")
    return known.tokens


def sequence_columns(token: Array, sequence: int | Array, position: Array) -> dict[str, Array]:
    """Token columns of rows whose sequences are documents of their own, all of one domain."""
    number = np.broadcast_to(np.asarray(sequence, np.int64), token.shape)
    zero = np.zeros(len(token), np.int64)
    return {"token": token, "sequence": number, "document": number, "position": position, "domain": zero}
