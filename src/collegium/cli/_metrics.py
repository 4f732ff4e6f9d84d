"""What ``measure`` and ``compare`` share: running metrics, and showing their results as tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from collegium.errors import CollegiumError

if TYPE_CHECKING:
    from rich.table import Table

    from collegium.measure.metric import Metric
    from collegium.trace import Trace

__all__ = ["as_rows", "cell", "measuring", "result_table", "run_all"]


def run_all(
    wanted: Sequence[Metric], trace: Trace, *, model: Any = None, other: Trace | None = None
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Results by metric, and the reason for each metric that could not say anything.

    Raises:
        CollegiumError: no metric could say anything; the first of their reasons.
    """
    from collegium.measure.metric import rows_of

    results: dict[str, list[Any]] = {}
    refused: dict[str, CollegiumError] = {}
    for metric in measuring(wanted):
        try:
            results[metric.name] = rows_of(metric.run(trace, model=model, other=other))
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


def result_table(metric: Metric, results: Sequence[Any]) -> Table:
    """A table of one metric, titled with its question."""
    from rich.table import Table

    rows = as_rows(results)
    heads = list(dict.fromkeys(head for row in rows for head in row))
    table = Table(title=f"{metric.name}: {metric.question}", title_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")  # a number or a head that is cut short says nothing
    for row in rows:
        table.add_row(*(cell(row.get(head)) for head in heads))
    return table


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
