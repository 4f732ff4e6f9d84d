"""Counts that were recorded elsewhere: how often each expert was chosen, without the tokens that chose it.

A `Trace` is one row a token, so counts are none; `collegium.measure.imported` makes `Statistics` of them.

Legend: L layers with routing, E experts of a layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from collegium.trace.importers.base import Known, checked_files
from collegium.trace.schema import LayerMeta

__all__ = ["COUNTERS", "Counted", "counter", "read_counts"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Counted:
    """Assignments by layer and expert.

    Attributes:
        layers: the MoE layers, ascending.
        counts: ``[E]`` int64 of each of `layers`, by logical expert.
        total: decoder layers that the files have rows for, dense ones included.
        notes: what the files do not say, or what was left out.
    """

    layers: tuple[LayerMeta, ...]
    counts: tuple[Array, ...]
    total: int
    notes: tuple[str, ...]


Counter = Callable[[Sequence[Path], Known], Counted | None]
"""The function of one format: None if the files hold tokens."""

COUNTERS: dict[str, Counter] = {}
"""Name of a format -> its function; filled by `counter`."""

C = TypeVar("C", bound=Counter)


def counter(name: str) -> Callable[[C], C]:
    """Put a function into `COUNTERS`."""

    def register(function: C) -> C:
        COUNTERS[name] = function
        return function

    return register


def read_counts(format: str, files: Iterable[str | os.PathLike[str]], known: Known | None = None) -> Counted | None:
    """The counts in `files`; None if they hold tokens, so that `import_trace` reads them.

    Raises:
        ConfigError: no such format, no files, or something must be known that is not.
        TraceError: a file is damaged, or its counts are not understood; it and the field are named.
    """
    paths = checked_files(format, files)
    return COUNTERS[format](paths, known or Known()) if format in COUNTERS else None
