"""Whether models fit in memory, told from their headers before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from collegium.errors import ConfigError
from collegium.models.checkpoint import BITS, Checkpoint

__all__ = ["available_bytes", "check_memory", "needed_bytes"]

_MARGIN = 1.2
"""What a model takes, over its weights: hidden states, logits, and the copies made while it is loaded."""
_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


def needed_bytes(checkpoints: Sequence[Checkpoint], dtype: str | None = None) -> int:
    """Memory that these models need, all at once; estimated from their headers.

    Args:
        dtype: they are loaded in; None means as they are stored.
    """
    total = 0
    for one in checkpoints:
        for info in one.tensors.values():
            floating = BITS[info.dtype] in (16, 32, 64) and info.dtype[0] in "FB"
            total += info.numel * _DTYPES[dtype] if dtype is not None and floating else info.nbytes
    return int(_MARGIN * total)


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def check_memory(checkpoints: Sequence[Checkpoint], dtype: str | None = None) -> None:
    """Refuse models that together do not fit in memory.

    Raises:
        ConfigError: they do not; the message has the numbers.
    """
    need, have = needed_bytes(checkpoints, dtype), available_bytes()
    if have is not None and need > have:
        names = " and ".join(one.folder.name for one in checkpoints)
        raise ConfigError(
            f"{names} need about {need / 1e9:.1f} GB of memory{' together' if len(checkpoints) > 1 else ''}, and "
            f"{have / 1e9:.1f} GB are free; close other programs, or use a machine with more memory"
        )
