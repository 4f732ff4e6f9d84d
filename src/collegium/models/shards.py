"""Writing safetensors shards out of byte ranges of other ones, and copying what lies beside them.

The bytes pass through the kernel where it can. Nothing of them is decoded, so any dtype and any quantisation moves as
it is, and memory does not grow with the checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from collegium.errors import CheckpointError, NonFiniteError, StorageError
from collegium.models.checkpoint import BITS

__all__ = ["SHARD_BYTES", "Piece", "check_space", "copy_others", "copy_range", "shards", "source_state", "write_shards"]

SHARD_BYTES = 5_000_000_000
"""A shard ends before it grows beyond this; a tensor that is larger has a shard of its own."""

_STEP = 1 << 25  # bytes between two calls of `progress`
_BUFFER = 1 << 20  # bytes, where the kernel cannot copy by itself; larger ones are slower
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_KERNEL_COPY = getattr(os, "copy_file_range", None)  # Linux only
_FOLDERS = ("additional_chat_templates",)
_WEIGHTS = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack",
    ".npz",
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One tensor to write.

    Attributes:
        name, dtype, shape: as its header entry will say.
        file: the source shard that holds its bytes; "" for a tensor that is computed.
        ranges: (first byte in that file, length), in the order they are written.
        computed: length in bytes of a tensor that is computed.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    ranges: tuple[tuple[int, int], ...]
    computed: int = 0

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.computed + sum(length for _, length in self.ranges)


def shards(pieces: list[Piece], limit: int = SHARD_BYTES) -> dict[str, list[Piece]]:
    """File name -> its tensors: the pieces in their order, cut into files of at most `limit` bytes.

    Within a file wider dtypes come first, so that every tensor begins at a multiple of its element size.
    """
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if groups[-1] and size + piece.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.nbytes
    if len(groups) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return {
        name: sorted(group, key=lambda piece: -BITS[piece.dtype]) for name, group in zip(names, groups, strict=True)
    }


def write_shards(
    files: dict[str, list[Piece]],
    source: Path,
    out: Path,
    progress: Callable[[int], None] | None = None,
    compute: Callable[[str], Tensor] | None = None,
) -> None:
    """Write `files` (see `shards`) to `out` out of the shards in `source`, and an index if there are several.

    Args:
        compute: gives the tensors of the pieces that are computed, by name.
        progress: called with the number of bytes just written.

    Raises:
        CheckpointError: a shard of the source became shorter.
        OSError: something could not be read or written.
    """
    for name, pieces in files.items():
        with ExitStack() as stack:
            needed = {piece.file for piece in pieces if piece.file}
            opened = {file: stack.enter_context(_open(source / file)) for file in needed}
            target = stack.enter_context(open(out / name, "wb", buffering=0))
            _write_all(target.fileno(), _header(pieces))
            for piece in pieces:
                if piece.computed:
                    assert compute is not None
                    _write_all(target.fileno(), _content(compute(piece.name), piece))
                    if progress is not None:
                        progress(piece.nbytes)
                for offset, nbytes in piece.ranges:
                    for done in copy_range(opened[piece.file].fileno(), target.fileno(), offset, nbytes):
                        if progress is not None:
                            progress(done)
    if len(files) > 1:
        weight_map = {piece.name: name for name, pieces in files.items() for piece in pieces}
        total = sum(piece.nbytes for pieces in files.values() for piece in pieces)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _content(tensor: Tensor, piece: Piece) -> memoryview:
    """The bytes of a computed tensor, which must be what the header says, and finite."""
    if tuple(tensor.shape) != piece.shape or tensor.nbytes != piece.nbytes:
        raise CheckpointError(f"{piece.name!r} was computed as {list(tensor.shape)}, announced as {list(piece.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"{piece.name!r} was computed as NaN or infinite; a weight of the source is damaged")
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def copy_range(source: int, target: int, offset: int, nbytes: int) -> Iterator[int]:
    """Append `nbytes` of the open file `source`, from `offset` on, to `target`; yields how many went at a time.

    Raises:
        CheckpointError: `source` ends before that.
        OSError: what reading or writing raised.
    """
    kernel = _KERNEL_COPY
    buffer: memoryview | None = None
    while nbytes:
        if kernel is not None:
            try:
                done = kernel(source, target, min(nbytes, _STEP), offset)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                kernel = None
                continue
            if not done:  # the end of the file, or a file system that says so of every file
                kernel = None
                continue
        else:
            if buffer is None:
                buffer = memoryview(bytearray(min(nbytes, _BUFFER)))
            done = os.preadv(source, [buffer[:nbytes]], offset)
            if not done:
                raise CheckpointError(
                    f"a shard of the source ends at byte {offset}, {nbytes} bytes before its header says; it became "
                    "shorter while it was read"
                )
            _write_all(target, buffer[:done])
        offset += done
        nbytes -= done
        yield done


def _open(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror}") from error


def _header(pieces: list[Piece]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        entries[piece.name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [end, end + piece.nbytes],
        }
        end += piece.nbytes
    raw = json.dumps(entries, separators=(",", ":")).encode("ascii")
    raw += b" " * (-len(raw) % 8)  # the data begins aligned
    return len(raw).to_bytes(8, "little") + raw


def _write_all(target: int, content: bytes | memoryview) -> None:
    while content:  # a call may take a part of it
        content = content[os.write(target, content) :]


def check_space(out: Path, nbytes: int) -> None:
    """Raise StorageError if there is no room for so many bytes where `out` is to be."""
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise StorageError(f"{out} needs {nbytes / 1e9:.2f} GB, and {place} has {free / 1e9:.2f} GB free")


def source_state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Size, time of change and inode of everything the result is made from."""
    stats = ((file.name, file.stat()) for file in folder.glob("*") if file.is_file())
    return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats}


def copy_others(folder: Path, out: Path, but: Collection[str]) -> None:
    """Copy everything of a model folder that is no weights, except for the files of these names."""
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.name in but or file.name.endswith(_WEIGHTS):
            continue
        if not file.is_dir():
            shutil.copyfile(file, out / file.name)
        elif file.name in _FOLDERS:
            shutil.copytree(file, out / file.name)
