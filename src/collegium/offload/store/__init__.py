"""Experts on a disk: `pack` writes them so that one is one read, `open_source` opens them, `ReadQueue` reads them."""

from __future__ import annotations

from collegium.offload.store.opening import open_source
from collegium.offload.store.packed import ExpertStore, open_store
from collegium.offload.store.packing import pack
from collegium.offload.store.plain import PlainExperts, open_plain
from collegium.offload.store.reader import DEMAND, PREFETCH, ReadQueue, Ticket
from collegium.offload.store.source import ExpertSource, StoredLayer, aligned

__all__ = [
    "DEMAND",
    "PREFETCH",
    "ExpertSource",
    "ExpertStore",
    "PlainExperts",
    "ReadQueue",
    "StoredLayer",
    "Ticket",
    "aligned",
    "open_plain",
    "open_source",
    "open_store",
    "pack",
]
