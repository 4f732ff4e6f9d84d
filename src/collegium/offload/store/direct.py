"""`DirectFile`: reads that go past the page cache, from the disk into the caller's memory.

A model that is larger than the memory would fill the page cache with experts that are read once, and the budget of a
cgroup counts that. Where the file system has no direct reads, the pages are dropped as soon as they were copied.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from collegium.errors import CheckpointError
from collegium.experts.stored import ALIGNMENT
from collegium.offload.store.source import Bytes, aligned

__all__ = ["DirectFile", "drop_pages", "warn_if_indirect"]

_O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only
_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


class DirectFile:
    """An open file.

    Attributes:
        path: of it.
        size: bytes it had when it was opened.
        direct: whether reads pass the page cache by.

    Raises:
        CheckpointError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle, self.direct = _open(path)
            stat = os.fstat(self._handle)
        except OSError as error:
            raise CheckpointError(f"could not open {path}: {error.strerror}") from error
        self.size, self._changed = stat.st_size, (stat.st_mtime_ns, stat.st_size)

    def read(self, into: Bytes, offset: int) -> int:
        """Read until `into` is full or the file ends; how many bytes were read. Threads may read at once.

        Args:
            into: aligned as `collegium.offload.store.source.aligned` does, a multiple of 4096 long.
            offset: a multiple of 4096.

        Raises:
            OSError: the disk cannot.
        """
        view, done = into.data, 0
        while done < len(view):
            got = os.preadv(self._handle, [view[done:]], offset + done)
            done += got
            if not got or (self.direct and got % ALIGNMENT):  # the end of the file
                break
        if not self.direct:
            drop_pages(self._handle, offset, len(view))
        return done

    def changed(self) -> bool:
        """Whether somebody wrote to it since it was opened."""
        stat = os.fstat(self._handle)
        return (stat.st_mtime_ns, stat.st_size) != self._changed

    def close(self) -> None:
        """Close it; a read after that fails."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1


def warn_if_indirect(folder: Path, files: Iterable[DirectFile]) -> bool:
    """Whether all reads pass the page cache by; if not, one warning says so."""
    direct = all(file.direct for file in files)
    if not direct:
        warnings.warn(
            f"the file system of {folder} has no direct reads: they go through the page cache, whose pages are dropped "
            "after each, and are slower",
            stacklevel=4,
        )
    return direct


def drop_pages(handle: int, offset: int = 0, nbytes: int = 0) -> None:
    """Take clean pages of an open file out of the page cache; 0 bytes means up to its end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, offset, nbytes, os.POSIX_FADV_DONTNEED)


def _open(path: Path) -> tuple[int, bool]:
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
    if _O_DIRECT:
        try:
            handle = os.open(path, flags | _O_DIRECT)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
        else:
            try:
                # some file systems take the flag and refuse the read
                os.preadv(handle, [aligned(ALIGNMENT).data], 0)
                return handle, True
            except OSError as error:
                os.close(handle)
                if error.errno not in _REFUSED:
                    raise
    handle = os.open(path, flags)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # or the kernel reads ahead what nobody asked for
    return handle, False
