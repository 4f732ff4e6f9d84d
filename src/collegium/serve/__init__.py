"""An OpenAI-compatible HTTP server over a `Batcher`, with metrics, traces of requests and a chat page."""

from __future__ import annotations

from collegium.serve.app import build_app
from collegium.serve.run import serve

__all__ = ["build_app", "serve"]
