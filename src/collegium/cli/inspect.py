"""``collegium inspect``: what a model folder holds, from its config and headers."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collegium.models.summary import LayerSummary, Summary

__all__ = ["run"]


_SOURCES = {
    "headers": "from the headers",
    "predicted": "predicted from the config, before any quantisation",
    "partial": "of the shards that are there; the family is not known, so the rest cannot be predicted",
}


def run(
    model: Annotated[
        Path, typer.Argument(help="A folder with config.json and, if there are any, *.safetensors; or demo.")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Also read every weight once and name a tensor with NaN or infinity.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show a model's family, MoE layers, experts, parameters (total and active per token) and sizes.

    Only the config and the headers are read, so the size of the checkpoint does not matter. With missing shards or
    without weights the numbers are predicted from the config.
    """
    from collegium.assets import model_folder
    from collegium.models.checkpoint import open_checkpoint
    from collegium.models.summary import summarize

    checkpoint = open_checkpoint(model_folder(model))
    summary = summarize(checkpoint)
    if verify:
        from collegium.cli._model import byte_progress

        with byte_progress() as progress:
            bar = progress.add_task("reading weights", total=sum(info.nbytes for info in checkpoint.tensors.values()))
            checkpoint.verify_finite(lambda nbytes: progress.advance(bar, nbytes))
    if as_json:
        complete = bool(checkpoint.tensors) and not checkpoint.missing
        record = {"model": str(model), "fingerprint": checkpoint.fingerprint if complete else None, **summary.record()}
        typer.echo(json.dumps(record, indent=2))
        return
    _print(str(model), summary)


def _print(model: str, summary: Summary) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts(summary):
        facts.add_row(f"[bold]{name}[/bold]", value)
    console.print(f"[bold]{model}[/bold]")
    console.print(facts)
    parts = Table("part", "parameters", "share", "bytes", title=f"where the parameters are ({summary.source})")
    for part, (count, nbytes) in summary.parts.items():
        if count or nbytes:
            share = f"{count / max(summary.parameters, 1):.1%}"
            parts.add_row(part.replace("_", " "), f"{count:,}", share, _size(nbytes))
    console.print(parts)
    if not summary.moe_layers:
        console.print("no MoE layers: this is a dense model")
        return
    layers = Table("layers", "E", "K", "expert", "bytes", "layer", "active", "bytes", title="MoE layers")
    for span, layer in _runs(summary):
        layers.add_row(
            span,
            _or_unknown(layer.num_experts),
            _or_unknown(layer.top_k),
            _count(layer.expert_parameters),
            _size(layer.expert_nbytes),
            _count(layer.parameters),
            _count(layer.active_parameters),
            _size(layer.nbytes),
        )
    console.print(layers)


def _facts(summary: Summary) -> list[tuple[str, str]]:
    share = f" ({summary.active_parameters / summary.parameters:.1%})" if summary.active_parameters else ""
    facts = [
        ("family", summary.family + (f" ({summary.architecture})" if summary.architecture else "")),
        ("layers", f"{summary.num_layers}, of which {len(summary.moe_layers)} are MoE"),
        ("parameters", f"{summary.parameters:,}"),
        ("active per token", _or_unknown(summary.active_parameters) + share),
        ("size", f"{_size(summary.nbytes)} as {', '.join(summary.dtypes)}"),
        ("counts", _SOURCES[summary.source]),
    ]
    if summary.moe_layers:
        facts += [
            ("score", summary.score or "unknown"),
            ("shared experts", str(summary.shared_experts)),
            ("expert width", _or_unknown(summary.expert_width)),
        ]
    if summary.extra_parameters:
        facts.append(
            ("extra layers", f"{summary.extra_parameters:,} parameters for multi-token prediction, not counted")
        )
    if summary.quantization:
        facts.append(("quantisation", summary.quantization))
    if summary.missing:
        facts.append(("[red]missing shards[/red]", ", ".join(summary.missing)))
    return facts


def _runs(summary: Summary) -> list[tuple[str, LayerSummary]]:
    """Neighbouring layers that are alike, as one row."""

    def kind(layer: LayerSummary) -> tuple[object, ...]:
        return layer.stack, layer.num_experts, layer.top_k, layer.parameters, layer.active_parameters, layer.nbytes

    stacks = len({layer.stack for layer in summary.moe_layers})
    rows = []
    for _, group in groupby(summary.moe_layers, kind):
        alike = list(group)
        first, last = alike[0].layer, alike[-1].layer
        span = str(first) if first == last else f"{first}-{last}"
        if len(alike) != last - first + 1:
            span = ", ".join(str(layer.layer) for layer in alike)
        rows.append((f"{alike[0].stack}.{span}" if stacks > 1 else span, alike[0]))
    return rows


def _size(nbytes: int) -> str:
    return _scaled(nbytes, ("B", "kB", "MB", "GB", "TB"))


def _count(value: int | None) -> str:
    return "unknown" if value is None else _scaled(value, ("", "k", "M", "B", "T"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = min(len(units) - 1, max(0, len(str(int(value))) - 1) // 3)
    return f"{value / 1000**power:.{2 if power else 0}f} {units[power]}".rstrip()


def _or_unknown(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"
