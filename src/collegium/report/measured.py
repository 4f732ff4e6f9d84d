"""Everything the page shows of a trace, measured once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from collegium.errors import CollegiumError, TraceError
from collegium.measure.load import load
from collegium.measure.metric import Metric, metrics, missing_needs, plain, rows_of
from collegium.trace import Trace

__all__ = ["Measured", "measure"]

_OF_OTHER = ("load", "locality", "domains")


@dataclass(frozen=True, eq=False)
class Measured:
    """The metrics of a trace.

    Attributes:
        trace: what was measured.
        results: name of the metric -> its result.
        missing: name of a metric that has none -> why, and what to do about it.
        by_domain: load of each (layer, domain) that has tokens; empty with one domain.
        other: the trace it is compared with, or None.
        other_results: results of the other trace alone, for those shown side by side.
        seconds: what each metric took.
    """

    trace: Trace
    results: Mapping[str, Any]
    missing: Mapping[str, str] = field(default_factory=dict)
    by_domain: tuple[Any, ...] = ()
    other: Trace | None = None
    other_results: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        """The result of a metric, None if there is none."""
        return self.results.get(name)

    def record(self) -> dict[str, Any]:
        """The numbers as JSON data: the rows of each metric's table."""
        return {
            "trace": str(self.trace.folder),
            "compared_with": None if self.other is None else str(self.other.folder),
            "metrics": {name: plain([row.summary() for row in rows_of(found)]) for name, found in self.results.items()},
            "missing": dict(self.missing),
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
        }


def measure(
    trace: Trace, *, other: Trace | None = None, model: Any = None, say: Callable[[str, int, int], None] | None = None
) -> Measured:
    """Run every metric that `trace` (with `other` and `model`, where given) can answer.

    A metric that refuses the trace is listed in `Measured.missing` with its reason.

    Args:
        say: called with (metric, how many are done, of how many) before each one.

    Raises:
        TraceError: a trace is damaged, or holds no tokens.
    """
    if not len(trace):
        raise TraceError(f"{trace.folder}: the trace holds no tokens, so there is nothing to show")
    known = metrics()
    results: dict[str, Any] = {}
    missing: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for done, wanted in enumerate(known):
        if say:
            say(wanted.name, done, len(known))
        start = time.perf_counter()
        found = _run(wanted, trace, other, model)
        if isinstance(found, str):
            missing[wanted.name] = found
        else:
            results[wanted.name] = found
            seconds[wanted.name] = time.perf_counter() - start
    by_domain: tuple[Any, ...] = ()
    if len(trace.meta.domains) > 1:
        by_domain = tuple(found for found in load(trace, by="domain") if found.counts.sum())
    other_results = {}
    for wanted in known:
        if other is not None and wanted.name in _OF_OTHER:
            found = _run(wanted, other, None, None)
            if not isinstance(found, str):
                other_results[wanted.name] = found
    if say:
        say("", len(known), len(known))
    return Measured(trace, results, missing, by_domain, other, other_results, seconds)


def _run(wanted: Metric, trace: Trace, other: Trace | None, model: Any) -> Any:
    """The result, or in words why there is none."""
    reason = missing_needs(wanted, trace)
    if reason is None and "other" in wanted.needs and other is None:
        reason = "needs a second trace of the same tokens; give it with --compare"
    if reason is None and "model" in wanted.needs and model is None:
        reason = "needs the model; give it with --model"
    if reason is not None:
        return reason
    try:
        return wanted.run(trace, model=model, other=other)
    except CollegiumError as error:
        if wanted.name == "load":  # which no sound trace is refused
            raise
        return str(error)
