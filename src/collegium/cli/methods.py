"""``collegium methods``: the catalogue of methods, what each one does, and whether its claim holds."""

from __future__ import annotations

import difflib
import json
import re
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from collegium.catalog import Method

__all__ = ["run"]

UNTESTED = "no claim test yet"


def run(
    name: Annotated[
        str | None, typer.Argument(help="Show this method in full: its name, or KIND/NAME.", show_default=False)
    ] = None,
    kind: Annotated[str | None, typer.Option("--kind", "-k", help="Only methods of this kind.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: everything of every method.")] = False,
) -> None:
    """List every method: its paper, where it lives, and whether its claim holds, with the numbers.

    With a name, show one in full: what it does, its formula, its cost, when to use it, and its settings. A name that
    several kinds have shows all of them.

        collegium methods --kind system

        collegium methods ssr

        collegium methods selection/top_p
    """
    from collegium.catalog import methods

    found = methods(kind)
    if name is not None:
        found = _named(name, found)
    if as_json:
        typer.echo(json.dumps([m.record() for m in found], indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if name is None:
        _list(found, console)
        return
    for number, one in enumerate(found):
        if number:
            console.rule()
        _show(one, console)


def _named(name: str, among: list[Method]) -> list[Method]:
    from collegium.errors import ConfigError

    found = [one for one in among if name in (one.name, f"{one.kind}/{one.name}")]
    if not found:
        known = [one.name for one in among] + [f"{one.kind}/{one.name}" for one in among]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no method is named {name!r}; {hint}`collegium methods` lists them all")
    return found


def _list(found: list[Method], console: Console) -> None:
    """A table for each kind, in columns that wrap."""
    from rich.table import Table
    from rich.text import Text

    from collegium.catalog import KINDS

    modules = [one.module.removeprefix("collegium.") for one in found]
    width = max(map(len, [*modules, *(one.name for one in found)]), default=0)
    for kind, what in KINDS.items():
        members = [(one, module) for one, module in zip(found, modules, strict=True) if one.kind == kind]
        if not members:
            continue
        console.print(Text.assemble("\n", (kind, "bold"), f": {what}"))
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(width=width, overflow="fold")
        table.add_column()
        for one, module in members:
            name = Text.assemble((one.name, "cyan"), "\n", (module, "dim"))
            table.add_row(name, Text.assemble(one.paper, "\n", _claim(one)))
        console.print(table)
    tested = sum(one.claim is not None for one in found)
    console.print(Text(f"\n{len(found)} methods, {tested} with a claim test; collegium methods NAME shows one in full"))


def _claim(one: Method) -> Text:
    from rich.text import Text

    if one.claim is None:
        return Text(UNTESTED, "dim")
    color = "green" if one.claim["status"] == "holds" else "yellow"
    return Text.assemble((one.claim["status"], color), f": {one.claim['numbers']}")


def _show(one: Method, console: Console) -> None:
    """A method in full."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    source = one.paper + (f", arXiv {one.arxiv}" if one.arxiv else "")
    console.print(Text.assemble((f"{one.kind}/{one.name}", "bold"), f"  {source}"))
    console.print(Text(f"{one.module}.{one.obj.__qualname__}\n", "dim"))
    console.print(Text(_flowing(one.text)))
    for title, text in one.sections.items():
        console.print(Text(f"\n{title}", "bold"))
        console.print(Padding(Text(text if title == "Formula" else _flowing(text)), (0, 0, 0, 2)))
    if one.settings:
        console.print(Text("\nSettings", "bold"))
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column("name", no_wrap=True)
        table.add_column("type", overflow="fold", max_width=24)
        table.add_column("default", overflow="fold", max_width=20)
        table.add_column("meaning")
        for setting in one.settings:
            default = "needed" if setting.default is None else setting.default
            table.add_row(Text(setting.name, "cyan"), Text(setting.type), Text(default), Text(setting.meaning))
        console.print(Padding(table, (0, 0, 0, 2)))
    console.print(Text("\nClaim", "bold"))
    console.print(Padding(_claim(one), (0, 0, 0, 2)))


def _flowing(text: str) -> str:
    """Paragraphs whose lines the terminal breaks; what is indented keeps its lines."""
    text = re.sub(r"::$", ":", text.replace("``", "`"), flags=re.MULTILINE)
    parts = re.split(r"\n\s*\n", text)
    return "\n\n".join(part if re.search(r"^\s", part, re.MULTILINE) else " ".join(part.split()) for part in parts)
