"""MoE blocks in transformers models: put them in, save, load, export to a plain family.

Names are imported when they are first used: reading a checkpoint's headers (`collegium.models.checkpoint`) must not
wait for torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collegium.models.config import MoEConfig
    from collegium.models.exporting import export
    from collegium.models.folder import load, save
    from collegium.models.installing import install

__all__ = ["MoEConfig", "export", "install", "load", "save"]

_HOME = {"MoEConfig": "config", "export": "exporting", "install": "installing", "load": "folder", "save": "folder"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"collegium.models.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
