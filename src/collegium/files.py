"""Writing files so that a kill, a full disk or Ctrl-C never leaves half of one behind, and reading records of JSON.

Everything is written beside its target, flushed to the disk, and renamed: a reader sees the old content or the
new content, never a mixture.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from collegium.errors import CollegiumError, StorageError

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["atomic_dir", "atomic_file", "read_record", "sync_dir"]

Record = TypeVar("Record", bound="BaseModel")

PARTIAL = ".partial-"
"""Prefix of unfinished neighbours; readers ignore such names, and the next writer of the same target removes those
whose process on this machine is gone."""


def _partial(target: Path) -> Path:
    """A free name beside `target` that says who is writing; leftovers of killed writers are removed."""
    host = socket.gethostname()
    for left in target.parent.glob(f"{PARTIAL}{host}-*-{glob.escape(target.name)}"):
        pid = left.name.removeprefix(f"{PARTIAL}{host}-").partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return target.with_name(f"{PARTIAL}{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}-{target.name}")


def sync_dir(path: Path) -> None:
    """Flush a directory entry, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_storage_error(error: Exception) -> bool:
    # safetensors raises its own type with the operating system's error only in the text
    return isinstance(error, OSError) or (type(error).__name__ == "SafetensorError" and "os error" in str(error))


def _storage_error(target: Path, error: Exception) -> StorageError:
    reason = getattr(error, "strerror", None) or error
    return StorageError(f"could not write {target}: {reason}; what was there before is untouched")


@contextlib.contextmanager
def atomic_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `target` to write to; on success it is synced and renamed over `target`.

    Raises:
        StorageError: the file could not be written (disk full, no permission). `target` keeps its old content.
    """
    target = Path(target)
    partial = _partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb+") as handle:
            os.fsync(handle.fileno())
        partial.replace(target)
        sync_dir(target.parent)
    except Exception as error:
        if isinstance(error, StorageError) or not _is_storage_error(error):
            raise
        raise _storage_error(target, error) from error
    finally:
        with contextlib.suppress(OSError):  # a parent that is no folder; the error above says it better
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `target` to fill; on success it takes `target`'s place as a whole.

    Raises:
        StorageError: something in it could not be written. `target` keeps its old content.
    """
    target = Path(target)
    partial, retired = _partial(target), _partial(target)
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        if target.exists():
            target.rename(retired)
        try:
            partial.rename(target)
        except OSError:
            if retired.exists():
                retired.rename(target)
            raise
        sync_dir(target.parent)
    except Exception as error:
        if isinstance(error, StorageError) or not _is_storage_error(error):
            raise
        raise _storage_error(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def read_record(path: Path, record: type[Record], *, what: str, limit: int, error: type[CollegiumError]) -> Record:
    """A pydantic record from a JSON file, in which nothing is trusted.

    Args:
        what: it should be, in words.
        limit: bytes that the file may have.
        error: what is raised.

    Raises:
        error: the file is not readable, too large, or not such a record; the field is named.
    """
    from pydantic import ValidationError  # most who write files read no records

    try:
        if path.stat().st_size > limit:
            raise error(f"{path} is over the limit of {limit} bytes")
        return record.model_validate_json(path.read_bytes())
    except OSError as reason:
        raise error(f"could not read the {what} {path}: {reason.strerror}") from reason
    except ValidationError as reason:
        first = reason.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "file"
        raise error(f"{path}: field {field!r}: {first['msg'].removeprefix('Value error, ')}") from reason
