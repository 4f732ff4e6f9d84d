"""Generating from a loaded model for many at once: requests, sampling, text as it comes, continuous batching."""

from __future__ import annotations

from collegium.decode.batcher import Batcher, Observer
from collegium.decode.request import BatcherClosedError, Event, FieldError, QueueFullError, Request, TokenLogprob, Usage
from collegium.decode.stream import Stream

__all__ = [
    "Batcher",
    "BatcherClosedError",
    "Event",
    "FieldError",
    "Observer",
    "QueueFullError",
    "Request",
    "Stream",
    "TokenLogprob",
    "Usage",
]
