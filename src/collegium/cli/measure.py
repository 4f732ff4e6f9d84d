"""``collegium measure``: what a trace says, in numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collegium.cli._model import Device, Dtype, TrustRemoteCode

if TYPE_CHECKING:
    from collegium.measure.metric import Metric
    from collegium.measure.statistics import Statistics
    from collegium.trace import Trace

__all__ = ["run"]


def run(
    trace: Annotated[Path | None, typer.Argument(help="Folder of a trace, or of statistics.")] = None,
    names: Annotated[
        list[str] | None, typer.Option("--metric", "-m", help="Only this metric; repeatable. Else all that can be.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="The traced model, for metrics that need it; a folder, or demo.")
    ] = None,
    list_them: Annotated[bool, typer.Option("--list", help="List the metrics and what they need.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of tables.")] = False,
) -> None:
    """Measure a trace: how even the load is, how local the routing, how specialised the experts, and more.

    Intervals are 95 % intervals over documents. Metrics that compare two traces are in collegium compare. Statistics
    (of collegium calibrate, or imported counts) hold no tokens: only their load can be measured, without intervals.
    """
    from collegium.errors import ConfigError
    from collegium.measure.metric import find_metric, metrics

    if list_them:
        _list(metrics(), as_json)
        return
    if trace is None:
        raise ConfigError("name a trace to measure; --list shows the metrics")
    from collegium.cli._metrics import open_measured, run_all
    from collegium.measure.statistics import Statistics

    opened = open_measured(trace)
    asked = [find_metric(name) for name in dict.fromkeys(names or [])]
    unmet = {metric.name: why for metric in asked or metrics() if (why := _unmet(metric, opened, model)) is not None}
    if asked and unmet:
        raise ConfigError("; ".join(f"{name} {why}" for name, why in unmet.items()))
    wanted = [metric for metric in asked or metrics() if metric.name not in unmet]
    network = None if isinstance(opened, Statistics) else _open_model(model, dtype, device, trust_remote_code)
    results, refused = run_all(wanted, opened, model=network)
    unmet |= refused
    if asked and refused:
        raise ConfigError("; ".join(f"{name}: {why}" for name, why in refused.items()))
    _show(opened, trace, wanted, results, unmet, as_json)


def _unmet(metric: Metric, opened: Trace | Statistics, model: Path | None) -> str | None:
    from collegium.cli._metrics import why_not
    from collegium.measure.statistics import Statistics

    if isinstance(opened, Statistics):
        return why_not(metric, opened)
    if "other" in metric.needs:
        return "needs a second trace; use collegium compare"
    if "model" in metric.needs and model is None:
        return "needs the model; give --model"
    return why_not(metric, opened)


def _open_model(model: Path | None, dtype: str | None, device: str | None, trust_remote_code: bool) -> Any:
    from collegium.cli._model import open_folder, open_model

    if model is None:
        return None
    folder = open_folder(model, trust_remote_code=trust_remote_code).folder
    return open_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def _described(opened: Trace | Statistics, folder: Path) -> tuple[dict[str, Any], str]:
    """Head of the JSON; and what the intervals are, or why there are none, in words."""
    import numpy as np

    from collegium.measure.statistics import Statistics

    if isinstance(opened, Statistics):
        words = "none: counts do not know which document they are of"
        return {"statistics": str(folder), "tokens": opened.meta.tokens or None, "intervals": words}, words
    documents = len(np.unique(opened.column("document")))
    words = f"95 %, bootstrap over {documents:,} documents"
    if documents < 2:
        words = "none: the trace is of one document, which says nothing about the spread"
    return {"trace": str(folder), "tokens": len(opened), "intervals": words}, words


def _show(
    opened: Trace | Statistics,
    folder: Path,
    wanted: list[Metric],
    results: dict[str, list[Any]],
    unmet: dict[str, str],
    as_json: bool,
) -> None:
    from rich.console import Console

    from collegium.cli._metrics import result_tables
    from collegium.measure.metric import plain

    questions = {metric.name: metric for metric in wanted}
    head, intervals = _described(opened, folder)
    if as_json:
        found = {
            name: {"question": questions[name].question, "results": plain(value)} for name, value in results.items()
        }
        record = {**head, "metrics": found, "not_measured": unmet}
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    for name, value in results.items():
        console.print(*result_tables(questions[name], value, console.width), sep="\n")
    console.print(f"intervals: {intervals}", highlight=False)
    for name, why in sorted(unmet.items()):
        console.print(f"[bold]{name}[/bold] {why}", highlight=False)


def _list(known: list[Metric], as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if as_json:
        record = [{"name": m.name, "question": m.question, "needs": sorted(m.needs)} for m in known]
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
        return
    table = Table("metric", "question", "needs beside a trace")
    for metric in known:
        table.add_row(metric.name, metric.question, ", ".join(sorted(metric.needs)))
    Console().print(table)
