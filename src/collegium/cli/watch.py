"""``collegium watch``: a live view of a run in the terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collegium.cli._watch import Source

__all__ = ["run"]


def run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run, or of a trace.")],
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print what is there and end.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the run if it has not begun.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is there as JSON and end.")] = False,
) -> None:
    """Follow a training run or a trace while it is written: loss, tokens per second, and the load of every expert.

    The view ends with the run; Ctrl-C leaves it, and the run goes on.
    """
    from collegium.cli._watch import is_run, open_source

    try:
        if wait and not is_run(folder):
            typer.echo(f"waiting for {folder}", err=True)
            while not is_run(folder):
                time.sleep(min(interval, 1.0))
        source = open_source(folder)
        if as_json:
            typer.echo(json.dumps(source.poll().record(), indent=2))
        else:
            _show(source, folder, None if once else interval)
    except KeyboardInterrupt:
        return


def _show(source: Source, folder: Path, interval: float | None) -> None:
    """Draw frames until the run is complete; a single one if there is no interval."""
    from rich.console import Console
    from rich.live import Live

    from collegium.cli._watch import draw

    console = Console()
    if interval is None:
        console.print(draw(source.poll(), folder.name, width=console.width))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            frame = source.poll()
            live.update(draw(frame, folder.name, width=console.width, height=console.height), refresh=True)
            if frame.state == "complete":
                return
            time.sleep(interval)
