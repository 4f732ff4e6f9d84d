"""``collegium train``: run a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["run"]


def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML; see the recipes folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields to change, such as optim.lr=1e-3 or moe.router=ssr.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; runs/RECIPE unless said.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on from the latest checkpoint, or remove it and start over.")
    ] = True,
    twin: Annotated[
        bool, typer.Option("--dense-twin", help="Train the dense model with as many parameters per token instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Train a model as a recipe says; under torchrun, on several processes.

    Writes OUT/model, OUT/metrics.jsonl, OUT/recipe.yaml, OUT/summary.json and OUT/checkpoints. The same command goes on
    after an interruption. Ctrl-C finishes the step and writes a checkpoint first (exit status 130); a second one stops
    at once.

        collegium train recipes/tiny.yaml moe.num_experts=32 --out runs/tiny

        torchrun --nproc-per-node 2 -m collegium train recipes/tiny.yaml --out runs/tiny
    """
    import os

    from collegium.train import Recipe, dense_twin, train

    out = Path("runs") / recipe.stem if out is None else out
    plan = Recipe.load(recipe, overrides or [])
    summary = train(dense_twin(plan) if twin else plan, out, resume=resume)
    if os.environ.get("RANK", "0") == "0":
        if as_json:
            typer.echo(json.dumps(summary, indent=2))
        elif not summary["interrupted"]:
            _show(summary, out)
    if summary["interrupted"]:
        raise typer.Exit(130)


def _show(summary: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("held-out text", "bits per byte")
    for domain, value in summary["domains"].items():
        table.add_row(domain, f"{value:.4f}")
    table.add_section()
    table.add_row("all", f"{summary['bits_per_byte']:.4f}")
    size = summary["parameters"]
    Console().print(table)
    typer.echo(f"{size['total']:,} parameters, {size['active']:,} of them used per token")
    typer.echo(f"{summary['tokens']:,} tokens in {summary['seconds']:,.0f} s; the model is in {out / 'model'}")
