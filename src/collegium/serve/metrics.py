"""Counters for Prometheus: requests, tokens, waiting times, and what an engine counts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from collegium.decode import Batcher, Observer, Stream, Usage
from collegium.serve.routing_trace import Engine

__all__ = ["Metrics"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics(Observer):
    """The metrics of one server, in a registry of its own."""

    def __init__(self, batcher: Batcher, engine: Engine | None = None) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "collegium_requests", "Requests by HTTP status; 499: the client left.", ["status"], registry=registry
        )
        self._tokens = Counter("collegium_tokens", "Tokens of ended requests.", ["kind"], registry=registry)
        self._first = Histogram(
            "collegium_first_token_seconds",
            "From the request to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self._steps = Histogram(
            "collegium_step_seconds",
            "One turn: a chunk of a prompt and a token of each request.",
            buckets=SECONDS,
            registry=registry,
        )
        for name, help, read in (
            ("running", "Requests in the batch.", lambda: batcher.running),
            ("waiting", "Requests in the queue.", lambda: batcher.waiting),
        ):
            Gauge(f"collegium_requests_{name}", help, registry=registry).set_function(read)
        if engine is not None:
            registry.register(_EngineCounters(engine))

    def request(self, status: int) -> None:
        """A request was answered."""
        self._requests.labels(str(status)).inc()

    def tokens(self, usage: Usage | None) -> None:
        """A request has ended."""
        if usage is not None:
            self._tokens.labels("prompt").inc(usage.prompt_tokens)
            self._tokens.labels("generated").inc(usage.completion_tokens)

    def first_token(self, seconds: float) -> None:
        """A request got its first token."""
        self._first.observe(seconds)

    def step(self, running: Sequence[Stream], seconds: float) -> None:
        """A turn of the batcher is over."""
        self._steps.observe(seconds)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCounters(Collector):
    """Reads an engine's counters when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        for name, value in self._engine.counters().items():
            clean = re.sub(r"\W", "_", name).strip("_").lower()
            yield CounterMetricFamily(f"collegium_engine_{clean}", f"Of the engine: {name}.", value=value)

    def describe(self) -> Iterator[Any]:
        return iter(())
