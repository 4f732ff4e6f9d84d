"""What a model's routers did, on disk: record -> store -> read.

Reading needs neither torch nor transformers; `record` brings them in when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from collegium.trace.reader import Trace, TracePart
from collegium.trace.schema import LayerMeta, TraceMeta
from collegium.trace.store import LayerRows, TraceWriter, remove_trace

if TYPE_CHECKING:
    from collegium.trace.recorder import record, record_generate

__all__ = [
    "LayerMeta",
    "LayerRows",
    "Trace",
    "TraceMeta",
    "TracePart",
    "TraceWriter",
    "record",
    "record_generate",
    "remove_trace",
]


def __getattr__(name: str) -> Any:
    if name not in ("record", "record_generate"):
        raise AttributeError(f"module 'collegium.trace' has no attribute {name!r}")
    return getattr(importlib.import_module("collegium.trace.recorder"), name)
