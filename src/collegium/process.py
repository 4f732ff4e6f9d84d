"""What memory this process holds."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["peak_memory", "resident_memory"]


def resident_memory() -> int:
    """Bytes of memory that this process holds now. Linux only; 0 elsewhere."""
    return _status("VmRSS") or 0


def peak_memory() -> int:
    """Bytes that this process had resident at most, since it started its own program (or since the kernel was told to
    measure anew).

    Linux counts into `ru_maxrss` what the parent held when it forked, so the number is read from the process itself
    there.
    """
    found = _status("VmHWM")
    if found is not None:
        return found
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int | None:
    file = Path("/proc/self/status")
    if not file.exists():
        return None
    return next(1024 * int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(f"{name}:"))
