"""``collegium compare``: what differs between two traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collegium.measure.statistics import Statistics
    from collegium.trace import Trace

__all__ = ["run"]

SEGMENT = 16
"""Length of the segments that SRP is compared at, in tokens."""


def run(
    trace: Annotated[Path, typer.Argument(help="Folder of a trace, or of statistics.")],
    other: Annotated[Path, typer.Argument(help="Folder of another, such as one of a later checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of tables.")] = False,
) -> None:
    """Compare two traces: load, locality and specialisation side by side, and how far the routing itself moved.

    Metrics of the routing itself need traces of the same tokens, as recorded by the same command on two checkpoints. Of
    statistics, which hold counts and no tokens, the load is compared.
    """
    from rich.console import Console

    from collegium.cli._metrics import open_measured, result_tables, run_all, why_not
    from collegium.measure.metric import metrics, plain

    pair = open_measured(trace), open_measured(other)
    between = [metric for metric in metrics() if "other" in metric.needs]
    unmet = {
        metric.name: f"{folder}: {why}"
        for metric in between
        for folder, one in zip((trace, other), pair, strict=True)
        if (why := why_not(metric, one)) is not None
    }
    wanted = [metric for metric in between if metric.name not in unmet]
    sides, reasons = _side_by_side(pair)
    results, refused = run_all(wanted, pair[0], other=pair[1])
    unmet |= reasons | refused
    questions = {metric.name: metric for metric in wanted}
    if as_json:
        record = {
            "traces": [str(trace), str(other)],
            "side_by_side": plain(sides),
            "metrics": {
                name: {"question": questions[name].question, "results": plain(value)} for name, value in results.items()
            },
            "not_measured": unmet,
        }
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    _print_sides(console, sides)
    for name, value in results.items():
        console.print(*result_tables(questions[name], value, console.width), sep="\n")
    for name, why in sorted(unmet.items()):
        console.print(f"[bold]{name}[/bold] {why}", highlight=False)


def _numbers(results: list[Any], pick: Any) -> dict[int | None, Any]:
    return {result.layer: pick(result) for result in results}


def _srp(result: Any) -> Any:
    segments = [int(length) for length in result.segments]
    return result.srp[segments.index(SEGMENT)] if SEGMENT in segments else None


_SIDES = {
    "MaxVio": ("load", lambda result: result.max_violation),
    "entropy, bits": ("load", lambda result: result.entropy),
    f"SRP({SEGMENT})": ("locality", _srp),
    "domain, bits": ("domains", lambda result: result.bits),
}
"""Head -> metric and which of its numbers."""


def _side_by_side(
    pair: tuple[Trace | Statistics, Trace | Statistics],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """For each layer that both have, each number of `_SIDES` as ``[first, second]``; and why others are left out."""
    from collegium.cli._metrics import measuring, run_one, why_not
    from collegium.errors import CollegiumError
    from collegium.measure.metric import find_metric

    found: dict[str, tuple[list[Any], list[Any]]] = {}
    unmet: dict[str, str] = {}
    for metric in measuring([find_metric(name) for name in dict.fromkeys(name for name, _ in _SIDES.values())]):
        why = next((why for one in pair if (why := why_not(metric, one)) is not None), None)
        if why is not None:
            unmet[metric.name] = why
            continue
        try:
            found[metric.name] = run_one(metric, pair[0]), run_one(metric, pair[1])
        except CollegiumError as error:  # such as too few tokens for this one
            unmet[metric.name] = str(error)
    rows: dict[int | None, dict[str, Any]] = {}
    for head, (name, pick) in _SIDES.items():
        if name not in found:
            continue
        first, second = (_numbers(results, pick) for results in found[name])
        for layer in first:
            if layer in second and first[layer] is not None and second[layer] is not None:
                rows.setdefault(layer, {"layer": layer})[head] = [first[layer], second[layer]]
    return [rows[layer] for layer in sorted(rows, key=lambda layer: (layer is None, layer or 0))], unmet


def _print_sides(console: Any, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from collegium.cli._metrics import cell

    if not rows:
        console.print("the traces have no layer in common")
        return
    heads = [head for head in _SIDES if any(head in row for row in rows)]
    table = Table("layer", title="side by side: first, second, difference", title_justify="left")
    for head in heads:
        for part in (head, "second", "difference"):
            table.add_column(part, justify="right")
    for row in rows:
        cells = ["all" if row["layer"] is None else str(row["layer"])]
        for head in heads:
            values = row.get(head)
            if values is None:
                cells += ["-"] * 3
                continue
            first, second = map(float, values)
            cells += [cell(first), cell(second), f"{second - first:+.3g}"]
        table.add_row(*cells)
    console.print(table)
