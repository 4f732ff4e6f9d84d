"""``collegium recover``: train a shrunk model for a while to be like the one it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collegium.compress.recover import Recovered

__all__ = ["run"]


def run(
    student: Annotated[Path, typer.Argument(help="Folder of the shrunk model, with its tokenizer.")],
    data: Annotated[
        str, typer.Option("--data", help="'local', a folder of texts, a .jsonl or .parquet file, or a text file.")
    ],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Train on so many tokens.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result; it must not exist.")],
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Folder of the model it was made of, or demo.")
    ] = None,
    only: Annotated[str, typer.Option("--only", help="What to train: all, or router.")] = "all",
    kd: Annotated[
        tuple[float, float],
        typer.Option("--kd", help="Share of the teacher in the loss, in the first and the last step; 0 0 needs none."),
    ] = (1.0, 0.75),
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate; else 4e-4, 1e-3 for routers.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences in a step.")] = 8,
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens in a sequence.")] = 256,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of the text.")] = 0,
    store: Annotated[
        Path | None, typer.Option("--store", help="Keep the teacher's predictions in this folder, for other runs too.")
    ] = None,
    teacher_dtype: Annotated[
        str | None, typer.Option("--teacher-dtype", help="float32, bfloat16 or float16; else as it is stored.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with an unfinished run, or start again.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Train a shrunk model on text and on what the original predicts for it, and keep the result if it is better.

    Held-out text (the split "valid") decides: if its loss did not fall, nothing is written and the exit status is 1.
    The teacher runs first, alone; its predictions wait on disk beside OUT, in OUT.partial. After Ctrl-C or a kill the
    same command goes on.

        collegium recover small --teacher original --data local --tokens 1000000 --out better
    """
    from transformers.utils import logging

    from collegium.assets import model_folder
    from collegium.cli._data import open_data
    from collegium.cli._model import token_progress
    from collegium.compress.recover import recover

    logging.disable_progress_bar()  # there is one of our own
    with token_progress() as bars:
        tasks: dict[str, Any] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase)
            bars.update(tasks[phase], completed=done, total=total)

        try:
            found = recover(
                model_folder(student),
                None if teacher is None else model_folder(teacher),
                open_data(data),
                out,
                tokens=tokens,
                lr=lr,
                batch_size=batch_size,
                sequence_length=sequence_length,
                only=_only(only),
                kd_shares=kd,
                seed=seed,
                store=store,
                teacher_dtype=_dtype(teacher_dtype),
                resume=resume,
                progress=progress,
            )
        except KeyboardInterrupt:
            bars.stop()
            typer.echo(f"stopped; what is done is in {out}.partial, the same command goes on from there", err=True)
            raise typer.Exit(130) from None
    _show(found, out, as_json)
    if found.out is None:
        raise typer.Exit(1)


def _only(name: str) -> Any:
    from collegium.errors import ConfigError

    if name not in ("all", "router"):
        raise ConfigError(f"--only {name!r} is none of all, router")
    return name


def _dtype(name: str | None) -> Any:
    from collegium.cli._model import DTYPES
    from collegium.errors import ConfigError

    if name is None:
        return None
    if name not in DTYPES:
        raise ConfigError(f"--teacher-dtype {name!r} is none of {', '.join(DTYPES)}")
    import torch

    return getattr(torch, name)


def _show(found: Recovered, out: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    if as_json:
        record = {**asdict(found), "out": None if found.out is None else str(found.out), "kept": found.out is not None}
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
        return
    table = Table("held-out text", "nats per token before", "after")
    for name, (before, after) in found.domains.items():
        table.add_row(name, f"{before:.4f}", f"{after:.4f}")
    table.add_section()
    table.add_row("all", f"{found.before:.4f}", f"{found.after:.4f}")
    Console().print(table)
    typer.echo(f"{found.trained:,} parameters trained on {found.tokens:,} tokens in {found.seconds:,.0f} s")
    if found.out is None:
        typer.echo(
            f"the loss did not fall, so nothing was written; {out}.partial still has the teacher's predictions, for "
            "another try with --fresh",
            err=True,
        )
    else:
        typer.echo(f"the model is in {out}")
