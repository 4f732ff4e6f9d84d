"""The command line: one file a verb, found by name; nothing heavy is imported before a verb runs."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import typer

import collegium
from collegium.errors import CollegiumError

__all__ = ["app", "main"]

app = typer.Typer(
    name="collegium",
    help="One system for the whole life of a mixture-of-experts model: train it, trace it, see how it routes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"collegium {collegium.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _add_verbs() -> None:
    """Every module of this folder but this one holds one verb: a function `run` with a docstring and typed options."""
    package = importlib.import_module("collegium.cli")
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        if module.name != "main" and not module.name.startswith("_"):
            verb = importlib.import_module(f"collegium.cli.{module.name}")
            app.command(name=module.name.replace("_", "-"))(verb.run)


_add_verbs()


def main() -> None:
    """Entry point: a `CollegiumError` becomes one line on standard error and exit status 2."""
    try:
        app()
    except CollegiumError as error:
        typer.echo(f"collegium: error: {error}", err=True)
        sys.exit(2)
