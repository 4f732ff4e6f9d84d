"""``collegium report``: a routing trace as a page to look at."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collegium.cli._model import Device, Dtype, TrustRemoteCode

if TYPE_CHECKING:
    from collegium.models.checkpoint import Checkpoint
    from collegium.report.page import Say
    from collegium.trace import Trace

__all__ = ["run"]


def run(
    trace: Annotated[Path, typer.Argument(help="A trace folder.")],
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")],
    compare: Annotated[
        Path | None, typer.Option("--compare", help="A second trace of the same tokens, to show beside it.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="The traced model (a folder, or demo): adds text, sizes and what weights tell."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Only the tokenizer of the traced model: adds text.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", help="Also draw every figure into this folder (PNG, SVG).")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measured numbers as JSON.")] = False,
) -> None:
    """Write a self-contained page about a trace: verdict, load, specialisation, flow, caching, router, tokens.

    The page needs no network and no server; open it in a browser, or send it to somebody.
    """
    from collegium.assets import model_folder
    from collegium.cli._model import open_folder, open_model, open_tokenizer
    from collegium.models.summary import summarize
    from collegium.report import measure, write_figures, write_report
    from collegium.report.facts import expert_bytes
    from collegium.report.verdict import verdict
    from collegium.trace import Trace

    found = Trace.open(trace)
    other = None if compare is None else Trace.open(compare)
    network = words = summary = None
    if model is not None:
        checkpoint = open_folder(model, trust_remote_code=trust_remote_code)
        _check_model(found, checkpoint)
        summary = summarize(checkpoint)
        words = open_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
        network = open_model(checkpoint.folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if tokenizer is not None:
        words = open_tokenizer(model_folder(tokenizer), trust_remote_code=trust_remote_code)
    if words is not None:
        _check_tokenizer(found, words)
    with _progress() as say:
        measured = measure(found, other=other, model=network, say=say)
        write_report(found, out, compare=other, tokenizer=words, summary=summary, measured=measured, say=say)
        pictures = [] if png is None else write_figures(found, png, measured=measured)
    findings = verdict(measured, expert_bytes=expert_bytes(summary))
    if as_json:
        record = {
            "report": str(out),
            "figures": [str(file) for file in pictures],
            "verdict": [dataclasses.asdict(finding) for finding in findings],
            **measured.record(),
        }
        typer.echo(json.dumps(record, indent=2))
        return

    for finding in findings:
        typer.echo(f"{finding.question} {finding.answer}")
    typer.echo(f"{out} ({out.stat().st_size / 1e6:.1f} MB)" + (f", {len(pictures)} pictures in {png}" if png else ""))


def _check_model(trace: Trace, checkpoint: Checkpoint) -> None:
    """Raises ConfigError if the trace is of another checkpoint."""
    from collegium.errors import ConfigError

    if trace.meta.fingerprint is not None and trace.meta.fingerprint != checkpoint.fingerprint:
        raise ConfigError(
            f"{trace.folder} was recorded from {trace.meta.model} (fingerprint {trace.meta.fingerprint}), "
            f"{checkpoint.folder} has {checkpoint.fingerprint}; give the model it was recorded from"
        )


def _check_tokenizer(trace: Trace, tokenizer: Any) -> None:
    """Raises ConfigError if the trace's token ids are those of another tokenizer."""
    from collegium.data.tokenize import tokenizer_fingerprint
    from collegium.errors import ConfigError

    found = tokenizer_fingerprint(tokenizer)
    if trace.meta.tokenizer is not None and trace.meta.tokenizer != found:
        raise ConfigError(
            f"{trace.folder} was recorded with tokenizer {trace.meta.tokenizer}, this one is {found}; "
            "give the one it was recorded with"
        )


@contextlib.contextmanager
def _progress() -> Iterator[Say]:
    """A progress bar on standard error, as a function that is told what is being done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda what, done, of: bar.update(task, description=what, completed=done, total=of)
