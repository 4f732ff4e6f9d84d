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
    own: Annotated[
        bool,
        typer.Option(
            "--own",
            help="Where plain transformers cannot hold the result, write collegium's own format, which only collegium "
            "opens.",
        ),
    ] = False,
    statistics: Annotated[
        Path | None,
        typer.Option(
            "--statistics", help="The statistics the plan was made from, if its operator or router edit asks."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Write the model that a plan leaves of another one. Plain transformers loads it.

    Bytes are moved, and only experts that are merged, slimmed or factored are computed, one layer at a time: memory
    stays small whatever the size of the model, and quantised models that are only pruned stay as they are. The disk
    must have room for the result. A run that is interrupted leaves no model behind.

    No plain checkpoint holds layers that differ in their number of experts, experts that differ in width, factors, or a
    whole router before merged experts. With --own such a plan becomes a folder that the verbs of collegium open.
    """
    from collegium.assets import model_folder
    from collegium.cli._model import byte_progress
    from collegium.compress.own_write import save_own
    from collegium.compress.plan import Plan
    from collegium.compress.rewrite import apply_plan
    from collegium.errors import PlanError
    from collegium.measure.statistics import Statistics

    opened = Plan.load(plan)
    for note in opened.notes:
        typer.echo(f"note: {note}", err=True)
    if not opened.portable and not own:
        raise PlanError(
            f"{plan}: plain transformers cannot hold what this plan makes; add --own to write it in collegium's own "
            "format, or, if it only drops experts, try it as a mask on the whole model (collegium.compress.apply_mask)"
        )
    folder = model_folder(model)
    given = None if statistics is None else Statistics.load(statistics)
    write = apply_plan if opened.portable else save_own
    with byte_progress() as progress:
        bar = progress.add_task("writing", total=None)
        write(
            opened,
            folder,
            out,
            statistics=given,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    record = _record(opened, folder, out)
    experts, own_format = record["experts"], record["format"] == "own"
    each = experts if isinstance(experts, int) else f"{min(experts)} to {max(experts)}"
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    typer.echo(
        f"{each} of {record['of_experts']} experts in each of {record['layers']} layers, "
        f"{record['parameters']:,} of {record['of_parameters']:,} parameters, "
        f"{_size(record['nbytes'])} of {_size(record['of_nbytes'])}: {out}"
        + (" (collegium's own format)" if own_format else "")
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
        "format": "transformers" if plan.portable else "own",
        "layers": len(plan.layers),
        "experts": len(plan.layers[0].keep) if plan.uniform else [len(layer.keep) for layer in plan.layers],
        "of_experts": plan.layers[0].num_experts,
        "parameters": after.parameters,
        "of_parameters": before.parameters,
        "nbytes": after.nbytes,
        "of_nbytes": before.nbytes,
    }


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.2f} MB"
