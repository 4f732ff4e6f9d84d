"""What makes a function a metric: its name, the question it answers, and what it needs besides a trace.

    @metric("load", question="How evenly are the experts used?", paper="...")
    def load(trace: Trace) -> list[Load]: ...

`metrics` finds them all; ``collegium measure``, ``collegium compare`` and the report run them from there. A result is
a frozen dataclass (or a list of them, one a layer); `plain` makes JSON of it, and its ``summary()`` names the few
numbers a table shows.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.measure.estimate import Estimate
from collegium.trace import Trace

__all__ = ["Metric", "Result", "find_metric", "metric", "metrics", "missing_needs", "plain", "rows_of"]

Need = Literal["logits", "gate_inputs", "domains", "model", "other"]
"""Beyond experts and weights: router logits or gate inputs in the trace, two domains, the model itself (second
argument), a second trace (second argument)."""

F = TypeVar("F", bound=Callable[..., Any])


class Result(Protocol):
    """What a metric returns, one for each layer or one in all."""

    def summary(self) -> dict[str, int | float | str | Estimate | None]:
        """The numbers of one table row, in order; the names are the column heads, with units."""


@dataclass(frozen=True)
class Metric:
    """A catalogued metric. `function` takes a trace (then, by need, a model or a second trace) and its own settings;
    `iterated` says that it understands layers of several iterations."""

    name: str
    question: str
    needs: frozenset[Need]
    function: Callable[..., Any]
    iterated: bool = False

    def run(self, trace: Trace, *, model: Any = None, other: Trace | None = None) -> Any:
        """The result. `other` and `model` are handed on where they are taken."""
        arguments: dict[str, Any] = {}
        if model is not None and "model" in inspect.signature(self.function).parameters:
            arguments["model"] = model
        return self.function(trace, *([other] if "other" in self.needs else []), **arguments)


_metrics: dict[str, Metric] = {}


def metric(
    name: str,
    *,
    question: str,
    paper: str,
    arxiv: str | None = None,
    needs: Iterable[Need] = (),
    iterated: bool = False,
) -> Callable[[F], F]:
    """Catalogue a function as a metric.

    Args:
        name: on the command line and in the catalogue.
        question: what it answers, in plain words.
        paper: source of the definition (year).
        arxiv: its id.
        needs: what it needs besides experts and weights.
        iterated: it counts assignments, so that an expert may stand among a token's several times: in layers that
            route several times in a forward. Called on a trace of such a layer, other metrics raise TraceError.
    """

    def catalogue(function: F) -> F:
        guarded = function if iterated else _of_one_routing(name, function)
        _metrics[name] = Metric(name, question, frozenset(needs), guarded, iterated)
        return method(name, kind="metric", paper=paper, arxiv=arxiv)(guarded)

    return catalogue


def _of_one_routing(name: str, function: F) -> F:
    @functools.wraps(function)
    def guarded(trace: Trace, *args: Any, **kwargs: Any) -> Any:
        for one in (trace, *args):
            if isinstance(one, Trace):
                one.meta.need_one_routing(f"the metric {name!r}")
        return function(trace, *args, **kwargs)

    return cast("F", guarded)


def metrics() -> list[Metric]:
    """Every metric, by name. Imports this room."""
    package = importlib.import_module("collegium.measure")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"collegium.measure.{module.name}")
    return [_metrics[name] for name in sorted(_metrics)]


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ConfigError: there is none; the message lists them.
    """
    known = {metric.name: metric for metric in metrics()}
    if name not in known:
        raise ConfigError(f"no metric is named {name!r}; there are {', '.join(known)}")
    return known[name]


def missing_needs(wanted: Metric, trace: Trace) -> str | None:
    """Why `trace` cannot answer `wanted`, and what to do; None if it can. Does not look for "model" and "other"."""
    if not wanted.iterated and any(layer.iterations > 1 for layer in trace.meta.layers):
        return "reads one routing of a layer, and layers of this trace route several times for a token"
    if "logits" in wanted.needs and not trace.meta.has("logits"):
        return "needs router logits; record with --logits"
    if "gate_inputs" in wanted.needs and not trace.meta.has("gate_input"):
        return "needs the routers' inputs; record with --gate-inputs 0.1"
    if "domains" in wanted.needs and len(trace.meta.domains) < 2:
        return "needs at least two domains; trace a folder whose subfolders are domains"
    return None


def rows_of(result: Any) -> list[Any]:
    """A metric's result as a list, one entry for each row of its table."""
    return list(result) if isinstance(result, list | tuple) else [result]


def plain(value: Any) -> Any:
    """Results as JSON data: dataclasses become objects, arrays lists, NaN and infinities null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
