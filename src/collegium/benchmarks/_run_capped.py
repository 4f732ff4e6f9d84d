"""A command in a memory cgroup: what it holds is bounded, with the pages of the files it reads counted."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Capped", "forget", "run_capped", "why_not"]

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Version:
    """Where groups are made, and the names of the files in one."""

    folder: Path
    limit: str
    peak: str
    swap: tuple[str, str] | None  # file and what keeps the group from swapping


@dataclass(frozen=True)
class Capped:
    """What a command printed on standard output, and the most bytes that its group held."""

    output: str
    peak: int


def _version(root: Path) -> _Version:
    if (root / "memory" / "memory.limit_in_bytes").exists():
        return _Version(root / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes", None)
    return _Version(root, "memory.max", "memory.peak", ("memory.swap.max", "0"))


def why_not() -> str | None:
    """Why no command can be capped here; None if it can."""
    try:
        with _group(1 << 30):
            return None
    except OSError as error:
        return f"no memory cgroup can be made here ({error.strerror}); it takes root on Linux"


def run_capped(command: Sequence[str], limit: int) -> Capped:
    """Run a command in a group of its own that may hold `limit` bytes.

    Raises:
        OSError: no group can be made.
        subprocess.CalledProcessError: the command failed; -9 and 137 mean that the kernel ended it at the limit.
    """
    with _group(limit) as (folder, version):
        # the shell joins the group and then becomes the command, so that all the command does is counted
        joined = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(folder / "cgroup.procs"), *command]
        done = subprocess.run(joined, stdout=subprocess.PIPE, text=True, check=True)
        return Capped(done.stdout, int((folder / version.peak).read_text()))


@contextmanager
def _group(limit: int) -> Iterator[tuple[Path, _Version]]:
    version = _version(ROOT)
    folder = version.folder / f"collegium-bench-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / version.limit).write_text(str(limit))
        if version.swap is not None and (folder / version.swap[0]).exists():
            (folder / version.swap[0]).write_text(version.swap[1])
        if not (folder / version.peak).exists():
            raise OSError(0, f"this kernel has no {version.peak}")
        yield folder, version
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """The kernel lets go of a group a moment after its last process has ended."""
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)
    folder.rmdir()


def forget(*paths: Path) -> None:
    """Take files, and all files of folders, out of the page cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                handle = os.open(file, os.O_RDONLY)
                try:
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(handle)
