"""`open_source`: the experts of whatever the user named."""

from __future__ import annotations

from pathlib import Path

from collegium.assets import model_folder
from collegium.offload.store.meta import is_store
from collegium.offload.store.packed import ExpertStore
from collegium.offload.store.plain import PlainExperts

__all__ = ["open_source"]


def open_source(model: str | Path) -> ExpertStore | PlainExperts:
    """Open an expert store, a Hugging Face folder, or a shipped model by its name.

    Raises:
        ModelError: there is no such folder, or its experts cannot be read; see `ExpertStore` and `PlainExperts`.
    """
    folder = model_folder(model)
    return ExpertStore(folder) if is_store(folder) else PlainExperts(folder)
