"""`ExpertStore`: experts out of the folder that `pack` writes, one direct read each.

The checksum of a record is compared on its first read, and again on every read after somebody wrote to its file.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from collegium.errors import CheckpointError, ConfigError
from collegium.models.checkpoint import open_checkpoint
from collegium.offload.store.direct import DirectFile, warn_if_indirect
from collegium.offload.store.meta import CHECKSUMS, experts_file, read_meta
from collegium.offload.store.source import Bytes, StoredLayer, check_buffer, layout_of

__all__ = ["ExpertStore", "open_store"]


def open_store(folder: str | os.PathLike[str]) -> ExpertStore:
    """Open the folder that `pack` wrote. See `ExpertStore`."""
    return ExpertStore(folder)


class ExpertStore:
    """An open store, an `ExpertSource`.

    Attributes:
        meta: what it holds.
        checkpoint: the rest of the model.
        layers, fingerprint, expert_tensors, scratch_nbytes: as `ExpertSource` says.
        direct: whether reads pass the page cache by.

    Raises:
        CheckpointError: it is no store, or files are missing, damaged or of another size than they should be.
    """

    expert_tensors: frozenset[str] = frozenset()
    scratch_nbytes = 0

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.fingerprint = self.meta.fingerprint
        self.layers: tuple[StoredLayer, ...] = self.meta.stored()
        if not any(self.folder.glob("model*.safetensors")):
            raise CheckpointError(f"{self.folder} has lost its model*.safetensors, which is not experts; pack it again")
        self.checkpoint = open_checkpoint(self.folder)
        self.checkpoint.verify()
        self._checksums = _read_checksums(self.folder / CHECKSUMS, self.meta.checksums, self.layers)
        self._verified = {key: bytearray(len(sums)) for key, sums in self._checksums.items()}
        self._files: dict[tuple[int, int], DirectFile] = {}
        try:
            for index, bits in self._checksums:
                self._files[index, bits] = self._open(index, bits)
        except CheckpointError:
            self.close()
            raise
        self.direct = warn_if_indirect(self.folder, self._files.values())

    def read(self, layer: int, expert: int, bits: int, into: Bytes) -> None:
        """See `ExpertSource.read`."""
        nbytes = layout_of(self.layers, layer, expert, bits).nbytes
        check_buffer(into, nbytes)
        if not self._files:
            raise ConfigError(f"{self.folder} was closed; open it again")
        file = self._files[layer, bits]
        where = f"expert {expert} of layer {self.layers[layer].layer} ({self.layers[layer].path})"
        try:
            got, changed = file.read(into, expert * nbytes), file.changed()
        except OSError as error:
            raise CheckpointError(f"{file.path}: could not read {where}: {error.strerror}") from error
        if got != nbytes:
            raise CheckpointError(
                f"{file.path}: {where} ends after {got} of {nbytes} bytes; the file was cut off, pack the model again"
            )
        verified = self._verified[layer, bits]
        if changed or not verified[expert]:
            if zlib.crc32(into.data) != self._checksums[layer, bits][expert]:
                raise CheckpointError(
                    f"{file.path}: {where} does not fit its checksum; the file is damaged, pack the model again"
                )
            verified[expert] = 1

    def close(self) -> None:
        """Close the files. No thread may read any more."""
        files, self._files = self._files, {}
        for file in files.values():
            file.close()

    def _open(self, index: int, bits: int) -> DirectFile:
        one = self.layers[index]
        expected = one.num_experts * one.layouts[bits].nbytes
        file = DirectFile(self.folder / experts_file(index, bits))
        if file.size != expected:
            file.close()
            raise CheckpointError(
                f"{file.path} has {file.size} bytes, {one.num_experts} experts take {expected}; it is not complete, "
                "pack the model again"
            )
        return file


def _read_checksums(
    path: Path, expected: str, layers: tuple[StoredLayer, ...]
) -> dict[tuple[int, int], np.ndarray[Any, np.dtype[np.uint32]]]:
    """(index of the layer, bits) -> crc32 of each record."""
    try:
        found = f"{zlib.crc32(path.read_bytes()):08x}"
        tensors = load_file(path) if found == expected else {}
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror}") from error
    except Exception as error:  # foreign bytes; what their parser raises is not ours to list
        raise CheckpointError(f"{path} is not readable: {error}") from error
    sums = {(index, bits): tensors.get(f"{index}.{bits}") for index, one in enumerate(layers) for bits in one.layouts}
    checked = {
        key: value
        for key, value in sums.items()
        if value is not None and value.dtype == np.uint32 and value.shape == (layers[key[0]].num_experts,)
    }
    if found != expected or len(checked) < len(sums) or len(tensors) > len(sums):
        raise CheckpointError(f"{path} is not what the store was written with; it is damaged, pack the model again")
    return checked
