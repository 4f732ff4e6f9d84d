"""``collegium arena``: methods against one another."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collegium.arena import Results

__all__ = ["run"]

_IN_TERMINAL = (
    "bits_per_byte", "max_violation", "dead_experts", "specialisation", "active_experts", "fluctuation",
    "tokens_per_second",
)  # fmt: skip


def run(
    plan: Annotated[Path, typer.Argument(help="Plan in YAML; see recipes/arena.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields of all runs to change, such as run.tokens=200000.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; runs/PLAN unless said.")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Only this method, beside the baseline; can be said again.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train the listed methods on the same text with the same computation, several seeds each, and compare them.

    One run after another; the same command goes on after an interruption (exit status 130), and only writes the tables
    again when all is done. Writes OUT/arena.json, arena.md, arena.html and figures/; each run is in OUT/runs.

        collegium arena recipes/arena.yaml

        collegium arena recipes/arena.yaml run.tokens=200000 --only ssr --only moge --out runs/short
    """
    from rich.console import Console

    from collegium.arena import ArenaPlan, collect, run_arena
    from collegium.errors import CollegiumError
    from collegium.report.arena import write_arena

    out = Path("runs") / plan.stem if out is None else out
    opened = ArenaPlan.load(plan, overrides or [])
    if only:
        opened = opened.only(only)
    console = Console(stderr=True, soft_wrap=True)
    failed: CollegiumError | None = None
    try:
        done = run_arena(opened, out, say=lambda text: console.print(text, markup=False, highlight=False))
    except CollegiumError as error:
        failed, done = error, True
    if not done:
        raise typer.Exit(130)
    try:
        results = collect(opened, out)
    except CollegiumError as error:
        raise failed or error from error
    files = write_arena(results, out, shlex.join(["collegium", "arena", str(plan), *(overrides or [])]))
    if as_json:
        typer.echo(json.dumps(results.record(), indent=2, allow_nan=False))
    else:
        _show(results)
        typer.echo(f"written: {', '.join(map(str, files))} and {out / 'figures'}")
    if failed:
        raise failed


def _show(results: Results) -> None:
    from rich.console import Console
    from rich.table import Table

    from collegium.arena import LABELS
    from collegium.arena.results import formatted

    ranking = results.ranking()
    points = {} if ranking is None else {one.name: ranking.points[i] for i, one in enumerate(results.ranked)}
    table = Table("method", title=f"arena, baseline {results.plan.baseline}")
    for head in ("Swiss points", *(LABELS[number] for number in _IN_TERMINAL)):
        table.add_column(head, justify="right")
    for one in (*results.ranked, *(one for one in results.entries if not one.causal)):
        cells = [formatted(n, one.numbers[n], spread=False) if n in one.numbers else "-" for n in _IN_TERMINAL]
        table.add_row(one.name, f"{points[one.name]:.2f}" if one.name in points else "not causal", *cells)
    Console().print(table)
