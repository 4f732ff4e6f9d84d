"""What ``measure`` and ``compare`` share: opening what is measured, running metrics, showing results as tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collegium.errors import CollegiumError

if TYPE_CHECKING:
    from rich.table import Table

    from collegium.measure.metric import Metric
    from collegium.measure.statistics import Statistics
    from collegium.trace import Trace

__all__ = ["as_rows", "cell", "measuring", "open_measured", "result_tables", "run_all", "run_one", "why_not"]


def open_measured(folder: Path) -> Trace | Statistics:
    """The trace or the statistics in `folder`. Raises what opening them does."""
    from collegium.measure.statistics import META, Statistics
    from collegium.trace import Trace

    is_trace = (folder / "meta.json").is_file()
    return Statistics.load(folder) if not is_trace and (folder / META).is_file() else Trace.open(folder)


def why_not(metric: Metric, opened: Trace | Statistics) -> str | None:
    """Why what was opened cannot answer a metric, and what to do; None if it can."""
    from collegium.measure.metric import missing_needs
    from collegium.measure.statistics import Statistics

    if not isinstance(opened, Statistics):
        return missing_needs(metric, opened)
    if metric.name == "load":
        return None
    return "needs every token, and statistics hold only how often each expert was chosen; record a trace"


def run_one(
    metric: Metric, opened: Trace | Statistics, *, model: Any = None, other: Trace | Statistics | None = None
) -> list[Any]:
    """A metric's results, one for each row of its table. Of statistics only the load is known."""
    from collegium.measure.load import load_of_statistics
    from collegium.measure.metric import rows_of
    from collegium.measure.statistics import Statistics

    if isinstance(opened, Statistics):
        return load_of_statistics(opened)
    assert not isinstance(other, Statistics)  # `why_not` refuses what compares tokens
    return rows_of(metric.run(opened, model=model, other=other))


def run_all(
    wanted: Sequence[Metric],
    opened: Trace | Statistics,
    *,
    model: Any = None,
    other: Trace | Statistics | None = None,
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Results by metric, and the reason for each metric that could not say anything.

    Raises:
        CollegiumError: no metric could say anything; the first of their reasons.
    """
    results: dict[str, list[Any]] = {}
    refused: dict[str, CollegiumError] = {}
    for metric in measuring(wanted):
        try:
            results[metric.name] = run_one(metric, opened, model=model, other=other)
        except CollegiumError as error:  # such as too few documents for this one
            refused[metric.name] = error
    if refused and not results:
        raise next(iter(refused.values()))
    return results, {name: str(error) for name, error in refused.items()}


def measuring(wanted: Sequence[Metric]) -> Iterator[Metric]:
    """Each of `wanted`, shown on standard error while it is at work."""
    from rich.console import Console

    console = Console(stderr=True)
    for number, metric in enumerate(wanted, 1):
        # on anything but a terminal a spinner is noise
        text = f"{number}/{len(wanted)} {metric.name}: {metric.question}"
        with console.status(text) if console.is_terminal else contextlib.nullcontext():
            yield metric


def as_rows(results: Sequence[Any]) -> list[dict[str, Any]]:
    """The summaries of results, the layer in front; a layer of None stands for all of them."""
    rows = []
    for result in results:
        row = dict(result.summary())
        if hasattr(result, "layer"):
            layer = row.pop("layer", result.layer)
            row = {"layer": "all" if layer is None else layer, **row}
        rows.append(row)
    return rows


def result_tables(metric: Metric, results: Sequence[Any], width: int) -> Iterator[Table]:
    """Tables of one metric, titled with its question: several, one below the other, where `width` is too small for all
    columns; each begins with the first column."""
    from rich.table import Table

    rows = as_rows(results)
    columns = {
        head: [cell(row.get(head)) for row in rows] for head in dict.fromkeys(head for row in rows for head in row)
    }
    title = f"{metric.name}: {metric.question}"
    if not columns:
        yield Table("nothing to show", title=title, title_justify="left")
        return
    first, *others = columns
    while True:
        shown, room = [first], width - 1 - _wide(first, columns[first])
        while others and (len(shown) == 1 or _wide(others[0], columns[others[0]]) <= room):
            room -= _wide(others[0], columns[others[0]])
            shown.append(others.pop(0))
        table = Table(title=title, title_justify="left")
        for head in shown:
            table.add_column(head, overflow="fold")  # a number or a head that is cut short says nothing
        for row in zip(*(columns[head] for head in shown), strict=True):
            table.add_row(*row)
        yield table
        if not others:
            return
        title = f"{metric.name}, continued"


def _wide(head: str, cells: Sequence[str]) -> int:
    """Characters of a column whose cells stand on one line, its head broken between words, with a border."""
    return max(map(len, (*head.split(), *cells))) + 3


def cell(value: Any) -> str:
    """A value of a table: an interval if there is one, four digits, a dash for nothing."""
    from collegium.measure.estimate import Estimate

    if value is None:
        return "-"
    if isinstance(value, Estimate):
        return str(value) if value.low == value.low else cell(value.value)
    if isinstance(value, float):
        return "-" if value != value else f"{value:.4g}"
    return str(value)
