"""A checkpoint folder seen through its headers: ``config.json``, the shard index, and the safetensors headers.

Nothing of the weights is read to open one, so a checkpoint of 700 GB opens in about a second. A safetensors file is

    8 bytes   n, little-endian unsigned
    n bytes   JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__" (strings only)
    the rest  one buffer, row-major, covered by the tensors without holes or overlaps

and every one of these statements is checked, because a header may come from anywhere. Pickle files are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from collegium.errors import CheckpointError, NonFiniteError, RemoteCodeError

__all__ = ["BITS", "Checkpoint", "TensorInfo", "open_checkpoint", "read_header", "refuse_remote_code"]

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits per element of every safetensors dtype."""

# (word, mask, value): an element is NaN or infinite exactly when ``word & mask == value``
_NON_FINITE: dict[str, tuple[type[np.unsignedinteger[Any]], int, int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000, 0x7F80_0000),
    "C64": (np.uint32, 0x7F80_0000, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00, 0x7C00),
    "BF16": (np.uint16, 0x7F80, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
    "F8_E8M0": (np.uint8, 0xFF, 0xFF),
    "F8_E4M3FNUZ": (np.uint8, 0xFF, 0x80),
    "F8_E5M2FNUZ": (np.uint8, 0xFF, 0x80),
}

_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
_JSON_LIMIT = 500_000_000
_CHUNK = 1 << 23  # bytes read at a time by verify_finite
_SAMPLES, _SAMPLE_BYTES = 64, 256  # of the weights that go into the fingerprint
_VOLATILE = (
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
)  # config keys that do not change the model
_SHARD = re.compile(r"model-(\d{5,})-of-(\d{5,})\.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its header describes it.

    Attributes:
        file: name of the shard inside the folder.
        dtype: safetensors name, a key of `BITS`.
        offset: first byte, counted from the start of the file.
        nbytes: length in bytes.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return _product(self.shape)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model folder, opened by `open_checkpoint`.

    Attributes:
        config: the parsed ``config.json``.
        tensors: name -> `TensorInfo` of every tensor in a shard that is there; empty for a config-only folder.
        missing: shard file that is not there -> the tensors the index expects in it (unknown without an index: empty).
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    missing: dict[str, tuple[str, ...]]

    def verify(self) -> None:
        """Check that every weight is there.

        Raises:
            CheckpointError: shards are missing (they are listed), or the folder holds no weights at all.
        """
        if self.missing:
            names = sorted(self.missing)
            listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise CheckpointError(f"{self.folder}: {len(names)} shards are missing: {listed}; download them again")
        if not self.tensors:
            raise CheckpointError(f"{self.folder} holds a config but no *.safetensors weights")

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the model: a hash over its config, its tensor table, and a few samples of the weights.

        The samples tell apart two training states of one model; sharding the same weights differently changes nothing.

        Raises:
            CheckpointError: weights are missing.
        """
        self.verify()
        config = {key: value for key, value in self.config.items() if key not in _VOLATILE}
        digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
        names = sorted(self.tensors)
        for name in names:
            info = self.tensors[name]
            digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode(errors="surrogatepass"))
        step = -(-len(names) // _SAMPLES)
        for name in names[::step]:
            info = self.tensors[name]
            with open(self.folder / info.file, "rb") as handle:
                handle.seek(info.offset)
                digest.update(handle.read(min(info.nbytes, _SAMPLE_BYTES)))
        return digest.hexdigest()

    def verify_finite(self, progress: Callable[[int], None] | None = None) -> None:
        """Read every weight once, a few megabytes at a time, and look for NaN and infinity.

        Args:
            progress: called with the number of bytes just read.

        Raises:
            NonFiniteError: a tensor holds one; the message names it and the place.
            CheckpointError: weights are missing.
        """
        self.verify()
        for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
            if info.dtype not in _NON_FINITE:
                continue
            word, mask, value = _NON_FINITE[info.dtype]
            first = 0
            for chunk in self._chunks(info):
                words = np.frombuffer(chunk, word)
                bad = (words & word(mask)) == word(value)
                if bad.any():
                    place = first + int(bad.argmax())
                    raise NonFiniteError(
                        f"{self.folder / info.file}: tensor {name!r} ({info.dtype} {list(info.shape)}) holds NaN or "
                        f"infinity, first at flat position {place}; the checkpoint is damaged or its training diverged"
                    )
                first += words.size
                if progress is not None:
                    progress(len(chunk))

    def _chunks(self, info: TensorInfo) -> Iterator[bytes]:
        with open(self.folder / info.file, "rb") as handle:
            handle.seek(info.offset)
            left = info.nbytes
            while left:
                chunk = handle.read(min(left, _CHUNK))
                if not chunk:
                    raise CheckpointError(f"{self.folder / info.file} became shorter while it was read")
                left -= len(chunk)
                yield chunk


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face model folder through its headers. Missing shards are listed in the result, not raised.

    Raises:
        CheckpointError: no folder, no or no valid ``config.json``, a malformed index or header, a truncated shard,
            a tensor the index promises and its shard does not hold, or weights only as pickle files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the path of a model folder (nothing is downloaded)")
    config = _read_json(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return Checkpoint(folder, config, read_header(folder / "model.safetensors"), {})
    expected = _read_index(index) if index.exists() else _guess_shards(folder)
    if not expected and any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} holds its weights as pickle files (*.bin), which can execute code; convert them to safetensors"
        )
    tensors: dict[str, TensorInfo] = {}
    missing: dict[str, tuple[str, ...]] = {}
    for file, promised in sorted(expected.items()):
        if not (folder / file).exists():
            missing[file] = promised
            continue
        found = read_header(folder / file)
        lost = [name for name in promised if name not in found]
        if lost:
            raise CheckpointError(
                f"{folder / file}: the index promises {len(lost)} tensors it lacks, first {lost[0]!r}"
            )
        twice = found.keys() & tensors.keys()
        if twice:
            raise CheckpointError(f"{folder / file}: tensor {min(twice)!r} is also in {tensors[min(twice)].file}")
        tensors |= found
    return Checkpoint(folder, config, tensors, missing)


def refuse_remote_code(config: dict[str, Any]) -> None:
    """Refuse a config whose model class is only to be had by executing code that came with the checkpoint.

    A config may name such code (``auto_map``) and still be a family transformers has a class of its own for; that
    class is then used and nothing is refused.

    Raises:
        RemoteCodeError: there is no such class.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    family = str(config.get("model_type"))
    if config.get("auto_map") and family not in CONFIG_MAPPING_NAMES:
        raise RemoteCodeError(
            f"model_type {family!r} is unknown to transformers and its config asks to execute code that came with the "
            f"checkpoint ({config['auto_map']}); read that code first, then use --trust-remote-code"
        )


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The tensor table of one safetensors file, fully checked. Reads the header only.

    Raises:
        CheckpointError: the file is truncated or its header is not a valid one; says what is wrong.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path} is truncated: {size} bytes hold no header of {length} bytes")
            if length > _HEADER_LIMIT:
                raise CheckpointError(f"{path}: a header of {length} bytes is over the limit of {_HEADER_LIMIT}")
            raw = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror}") from error
    header = _parse_json(raw, path, "header", unique=True)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header field '__metadata__' must map strings to strings")
    tensors = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _tensor_info(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    where = f"{path}: header entry {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: dtype {dtype!r} is none of {', '.join(BITS)}")
    for field, value in (("shape", shape), ("data_offsets", offsets)):
        # bool is an int in Python, and JSON true is no size
        if (
            not isinstance(value, list)
            or len(value) > 64
            or not all(type(item) is int and 0 <= item < 1 << 63 for item in value)
        ):
            raise CheckpointError(f"{where}: {field} {value!r} is not a list of sizes")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {offsets} are not [begin, end]")
    bits = _product(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{where}: {dtype} {shape} takes {bits} bits, its data_offsets span {offsets[1] - offsets[0]} bytes"
        )
    return TensorInfo(path.name, dtype, tuple(shape), start + offsets[0], offsets[1] - offsets[0])


def _check_layout(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    end = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            what = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name!r} {what} (begins at byte {info.offset}, expected {end})")
        end += info.nbytes
    if size < end:
        raise CheckpointError(f"{path} is truncated: its header describes {end} bytes, the file holds {size}")
    if size > end:
        raise CheckpointError(f"{path}: {size - end} bytes after the last tensor belong to none")


def _read_index(path: Path) -> dict[str, tuple[str, ...]]:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: field 'weight_map' must map tensor names to shard files")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or re.search(r"[/\\\0]", file):
            raise CheckpointError(
                f"{path}: tensor {name!r} is mapped to {file!r}, no *.safetensors file of this folder"
            )
        shards.setdefault(file, []).append(name)
    return {file: tuple(names) for file, names in shards.items()}


def _guess_shards(folder: Path) -> dict[str, tuple[str, ...]]:
    """Shards of a folder without an index; their names say how many there should be."""
    found = [match for file in folder.glob("model-*.safetensors") if (match := _SHARD.fullmatch(file.name))]
    totals = {match[2] for match in found}
    if len(totals) > 1:
        raise CheckpointError(f"{folder} mixes shards of several checkpoints: of {' and of '.join(sorted(totals))}")
    if not totals:
        return {}
    total = totals.pop()
    if int(total) > 100_000:
        raise CheckpointError(f"{folder}: {found[0].string} claims {int(total)} shards")
    width = len(total)
    return {f"model-{i:0{width}d}-of-{total}.safetensors": () for i in range(1, int(total) + 1)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise CheckpointError(f"{path} is over the limit of {_JSON_LIMIT} bytes")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror}; is this a model folder?") from error
    return _parse_json(raw, path, "file")


def _parse_json(raw: bytes, path: Path, what: str, *, unique: bool = False) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique if unique else _decode_float)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the {what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: the {what} must be a JSON object, not {type(value).__name__}")
    return value


def _decode_float(pairs: list[tuple[str, Any]]) -> Any:
    # transformers writes infinity as {"__float__": "Infinity"}
    return float(pairs[0][1]) if len(pairs) == 1 and pairs[0][0] == "__float__" else dict(pairs)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is given twice")
    return table


def _product(shape: tuple[int, ...] | list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
