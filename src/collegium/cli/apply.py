"""``collegium apply``: a plan and a model become a smaller model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collegium.compress.plan import Plan

__all__ = ["run"]


def run(
    plan: Annotated[Path, typer.Argument(help="A plan, as a JSON file.")],
    model: Annotated[
        Path, typer.Option("--model", help="Folder of the model the plan was made for, or demo; it is not changed.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the smaller model; it must not exist.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Write the model that a plan leaves of another one. Plain transformers loads it.

    Bytes are moved, not computed: memory stays small whatever the size of the model, and quantised models stay as they
    are. The disk must have room for the result. A run that is interrupted leaves no model behind.
    """
    from collegium.assets import model_folder
    from collegium.cli._model import byte_progress
    from collegium.compress.plan import Plan
    from collegium.compress.rewrite import apply_plan

    opened = Plan.load(plan)
    for note in opened.notes:
        typer.echo(f"note: {note}", err=True)
    folder = model_folder(model)
    with byte_progress() as progress:
        bar = progress.add_task("writing", total=None)
        apply_plan(opened, folder, out, progress=lambda done, total: progress.update(bar, completed=done, total=total))
    record = _record(opened, folder, out)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    typer.echo(
        f"{record['experts']} of {record['of_experts']} experts in each of {record['layers']} layers, "
        f"{record['parameters']:,} of {record['of_parameters']:,} parameters, "
        f"{_size(record['nbytes'])} of {_size(record['of_nbytes'])}: {out}"
    )


def _record(plan: Plan, folder: Path, out: Path) -> dict[str, Any]:
    """What was made of what, from the headers of both."""
    from collegium.models.checkpoint import open_checkpoint
    from collegium.models.summary import summarize

    result = open_checkpoint(out)
    before, after = summarize(open_checkpoint(folder)), summarize(result)
    return {
        "model": str(out),
        "fingerprint": result.fingerprint,
        "layers": len(plan.layers),
        "experts": len(plan.layers[0].keep),
        "of_experts": plan.layers[0].num_experts,
        "parameters": after.parameters,
        "of_parameters": before.parameters,
        "nbytes": after.nbytes,
        "of_nbytes": before.nbytes,
    }


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.2f} MB"
