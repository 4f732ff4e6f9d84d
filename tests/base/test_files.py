"""Atomic writing: a failure of any kind leaves what was there before."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from collegium.errors import StorageError
from collegium.files import atomic_dir, atomic_file


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    for text in ("one", "two"):
        with atomic_file(target) as partial:
            partial.write_text(text)
            assert not target.exists() or target.read_text() == "one"
        assert target.read_text() == text
    assert names(target.parent) == ["a.txt"]


@pytest.mark.parametrize("failure", [ValueError("mine"), OSError(errno.ENOSPC, "No space left on device")])
def test_failure_keeps_the_old_file(tmp_path: Path, failure: Exception) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    expected = StorageError if isinstance(failure, OSError) else ValueError
    with pytest.raises(expected), atomic_file(target) as partial:
        partial.write_text("half")
        raise failure
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_failure_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_dir(target) as partial:
        (partial / "x").write_text("old")
    with pytest.raises(StorageError, match="model"), atomic_dir(target) as partial:
        (partial / "x").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (target / "x").read_text() == "old"
    with atomic_dir(target) as partial:
        (partial / "y").write_text("new")
    assert names(target) == ["y"]
    assert names(tmp_path) == ["model"]


def test_limit_hit_inside_safetensors_is_a_storage_error(tmp_path: Path) -> None:
    # a file-size limit fails a write the way a full disk does, without needing a file system of our own
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    target = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(8)}, target)
    old = target.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match="untouched"), atomic_file(target) as partial:
            save_file({"w": torch.zeros(1 << 16)}, partial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == old
    assert names(tmp_path) == ["m.safetensors"]


def test_kill_while_writing_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_dir(target) as partial:
        (partial / "x").write_text("old")
    program = (
        "import os, sys; from collegium.files import atomic_dir\n"
        "with atomic_dir(sys.argv[1]) as p:\n (p / 'x').write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(target)], check=False).returncode == -9
    assert (target / "x").read_text() == "old"
    assert len(names(tmp_path)) == 2, "the killed writer left its partial folder"
    with atomic_dir(target) as partial:
        (partial / "x").write_text("new")
    assert names(tmp_path) == ["model"]
    assert (target / "x").read_text() == "new"
