"""``collegium methods``: the catalogue of methods and whether each one's claim holds."""

from __future__ import annotations

import json
from typing import Annotated

import typer

__all__ = ["run"]


def run(
    kind: Annotated[str | None, typer.Option("--kind", "-k", help="Only methods of this kind.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List every method: name, kind, paper, where it lives, and whether its claim holds."""
    from collegium.catalog import methods

    found = methods(kind)
    if as_json:
        typer.echo(json.dumps([m.record() for m in found], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "name", "paper", "module", "claim", title=f"{len(found)} methods")
    for m in found:
        status = "" if m.claim is None else m.claim["status"]
        if m.claim and m.claim["status"] != "holds":
            status += f" ({m.claim['numbers']})"
        table.add_row(m.kind, m.name, m.paper, m.module.removeprefix("collegium."), status)
    Console().print(table)
