"""``collegium bench``: measure against a peer in the same run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from collegium.benchmarks.harness import Row

__all__ = ["run"]


def run(
    name: Annotated[str, typer.Argument(help="Which benchmark; without one they are listed.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A few points only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Run a benchmark: our time, the best peer's, the ratio (above 1 is better for us), and the physical limit.

    Ratios are of medians, both sides taken in turns in one run. Exit status 1 if a goal is missed.
    """
    from rich.console import Console

    from collegium.benchmarks.harness import benchmarks, find, rows

    if not name:
        for known in benchmarks():
            typer.echo(f"{known}: {(find(known).__doc__ or '').splitlines()[0]}")
        return
    find(name)
    console = Console(stderr=True)
    found: list[Row] = []
    try:
        # a log file shows no moving status line; there each point leaves a line
        with console.status(f"bench {name}") as status:
            found.extend(rows(name, quick, status.update if console.is_terminal else console.print))
    finally:  # a point that fails does not take those before it along
        if as_json:
            records = [row.record() for row in found]
            typer.echo(json.dumps({"name": name, "quick": quick, "rows": records}, indent=2))
        else:
            Console().print(_table(name, found))
    if any(row.met is False for row in found):
        raise typer.Exit(1)


def _table(name: str, found: list[Row]) -> Table:
    from rich.table import Table

    from collegium.benchmarks.harness import cost

    table = Table("point", "ours", "peer", "by", "ratio", "goal", "limit", "share", title=f"bench {name}")
    for row in found:
        goals = [] if row.goal is None else [f"{row.goal:.2f}"]
        goals += [] if row.most is None else [f"at most {cost(row.most, row.unit)}"]
        goals += [] if row.within is None else [f"within {row.within:.0%}"]
        if goals:
            goals.append("met" if row.met else "[bold red]missed[/]")
        table.add_row(
            row.name,
            cost(row.ours, row.unit),
            "" if row.peer is None else cost(row.peer, row.unit),
            row.peer_name,
            "" if row.ratio is None else f"{row.ratio:.2f}",
            " ".join(goals),
            row.limit,
            "" if row.share is None else f"{row.share:.0%}",
        )
    return table
