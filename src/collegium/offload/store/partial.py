"""The folder of a store that is being written, which survives a kill.

    STORE.partial/pack.json                what is packed and how; locked by the process that packs
    STORE.partial/experts-00003-8.bin      a layer, complete
    STORE.partial/done-00003.safetensors   that layer 3 is complete in all precisions, and its checksums

A file appears as a whole. A layer that is done is read again when the work goes on, and kept if it fits its checksums.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from collegium.errors import ConfigError, StorageError
from collegium.files import PARTIAL, atomic_file, sync_dir
from collegium.offload.store.direct import drop_pages
from collegium.offload.store.meta import experts_file, is_store
from collegium.offload.store.source import StoredLayer

__all__ = ["PartialStore", "Sums", "check_out"]

_RUN = "pack.json"
_CHUNK = 1 << 22  # bytes

Sums = dict[int, np.ndarray[Any, np.dtype[np.uint32]]]
"""Bits -> crc32 of each record of a layer."""


class PartialStore:
    """The unfinished store of `out`.

    Attributes:
        folder: where it is.

    Args:
        run: what is packed and how, as plain JSON data.
        overwrite: what is left of another run is deleted.

    Raises:
        ConfigError: it is of another model or other settings, or another process is packing it.
        StorageError: it cannot be written.
    """

    def __init__(self, out: Path, run: dict[str, Any], *, overwrite: bool) -> None:
        self.out, self.folder = out, out.with_name(f"{out.name}.partial")
        path = self.folder / _RUN
        run = json.loads(json.dumps(run))
        if self.folder.exists() and not path.is_file() and any(self._strangers()):
            raise ConfigError(f"{self.folder} is not an unfinished store; move it away, or choose another --out")
        if path.is_file():
            self._lock = _lock(path)
            if _read(path) == run:
                return
            self.close()
            if not overwrite:
                raise ConfigError(
                    f"{self.folder} is what is left of packing another model, or with other settings; repeat that to "
                    "finish it, remove it, or use --overwrite"
                )
            shutil.rmtree(self.folder)
        with atomic_file(path) as file:
            file.write_text(json.dumps(run, indent=1), encoding="utf-8")
        self._lock = _lock(path)

    def kept(self, index: int, layer: StoredLayer) -> Sums | None:
        """The checksums of a layer that is complete and undamaged; None where it is not."""
        try:
            found = load_file(self._done(index))
        except Exception:  # not there, or not readable: the layer is written again
            return None
        sums = {bits: found.get(str(bits)) for bits in layer.layouts}
        checked: Sums = {
            bits: value
            for bits, value in sums.items()
            if value is not None
            and value.shape == (layer.num_experts,)
            and _fits(self.folder / experts_file(index, bits), layer.layouts[bits].nbytes, value)
        }
        return checked if len(checked) == len(sums) else None

    def finish_layer(self, index: int, sums: Sums) -> None:
        """Note that a layer is complete. Its files must be there."""
        with atomic_file(self._done(index)) as path:
            path.write_bytes(save({str(bits): value for bits, value in sums.items()}))

    def finish(self) -> None:
        """Flush everything and put it in place of `out`.

        Raises:
            StorageError: it cannot be; `out` is as it was.
        """
        retired = self.out.with_name(f"{self.out.name}.retired")
        try:
            for file in self.folder.rglob("*"):
                if file.is_file():
                    _flush(file)
            if is_store(retired):
                shutil.rmtree(retired)
            if self.out.exists():
                self.out.rename(retired)
            try:
                self.folder.rename(self.out)
            except OSError:
                if retired.exists():
                    retired.rename(self.out)
                raise
            sync_dir(self.out.parent)
        except OSError as error:
            raise StorageError(f"could not write {self.out}: {error.strerror}; {self.folder} stays") from error
        for file in [self.out / _RUN, *self.out.glob("done-*.safetensors")]:
            file.unlink(missing_ok=True)
        if retired.exists():
            shutil.rmtree(retired, ignore_errors=True)

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._lock)

    def _done(self, index: int) -> Path:
        return self.folder / f"done-{index:05d}.safetensors"

    def _strangers(self) -> list[Path]:
        return [file for file in self.folder.iterdir() if not file.name.startswith(PARTIAL)]


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse a place for a store where something else is.

    Raises:
        ConfigError: there is.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_store(out):
        raise ConfigError(f"{out} exists and is no expert store; choose a folder that does not exist")
    if not overwrite:
        raise ConfigError(f"{out} is an expert store already; use --overwrite to replace it, or choose another folder")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # damaged, so another run's
        return None


def _lock(path: Path) -> int:
    """Hold a file for this process; the kernel lets go of it when the process ends, however it does."""
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise ConfigError(f"another process is packing into {path.parent}; wait for it, or choose another --out") from (
            error
        )
    return handle


def _fits(path: Path, nbytes: int, sums: np.ndarray[Any, np.dtype[np.uint32]]) -> bool:
    """Whether a file holds the records with these checksums and nothing else."""
    try:
        if path.stat().st_size != nbytes * len(sums):
            return False
        with open(path, "rb") as file:
            for expected in sums.tolist():
                value, left = 0, nbytes
                while left:
                    chunk = file.read(min(left, _CHUNK))
                    value, left = zlib.crc32(chunk, value), left - len(chunk)
                    if not chunk:
                        return False
                if value != expected:
                    return False
            drop_pages(file.fileno())
    except OSError:
        return False
    return True


def _flush(path: Path) -> None:
    """Bring a file to the disk, and out of the page cache."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        drop_pages(file.fileno())
