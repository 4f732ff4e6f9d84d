"""``collegium pack``: a model becomes a store that its experts are read from one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collegium.offload.store import ExpertStore

__all__ = ["run"]


def run(
    model: Annotated[Path, typer.Argument(help="Folder of a MoE model, or demo; it is not changed.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the store.")],
    bits: Annotated[
        list[int] | None,
        typer.Option("--bits", help="32, 16 (bfloat16), 8 or 4; several times for several side by side. Else 16."),
    ] = None,
    group: Annotated[int, typer.Option("--group", help="Weights that share a scale in 4 bits: 32 or 64.")] = 32,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a store, and what is left of an unfinished other one.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Write the experts of a model so that one expert is one read from the disk; everything else stays as it is.

    One expert is in memory at a time, or one decoder layer for families whose files must be converted. Beside
    OUT there is OUT.partial until the store is done; Ctrl-C or a kill loses one layer at most, and the same command
    goes on from there.

        collegium pack MODEL --out STORE --bits 8 --bits 4
    """
    from collegium.assets import model_folder
    from collegium.cli._model import byte_progress
    from collegium.offload.store import pack

    folder = model_folder(model)
    with byte_progress() as progress:
        bar = progress.add_task("packing", total=None)
        try:
            store = pack(
                folder,
                out,
                bits or [16],
                group,
                overwrite=overwrite,
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )
        except KeyboardInterrupt:
            typer.echo(f"stopped; the finished layers are in {out}.partial, the same command goes on", err=True)
            raise typer.Exit(130) from None
    record = _record(store, out)
    store.close()
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    sizes = ", ".join(f"{_size(nbytes)} in {bits} bits" for bits, nbytes in record["experts_nbytes"].items())
    typer.echo(
        f"{record['experts']} experts in {record['layers']} layers: {sizes}; the rest of the model "
        f"{_size(record['other_nbytes'])}: {out}"
    )
    if record["left_out"]:
        typer.echo(f"{record['left_out']} tensors of layers for multi-token prediction were left out")


def _record(store: ExpertStore, out: Path) -> dict[str, Any]:
    layers = store.layers
    return {
        "store": str(out),
        "fingerprint": store.fingerprint,
        "family": store.meta.family,
        "layers": len(layers),
        "experts": sum(one.num_experts for one in layers),
        "bits": list(store.meta.bits),
        "group": store.meta.group,
        "experts_nbytes": {
            str(bits): sum(one.num_experts * one.layouts[bits].nbytes for one in layers) for bits in store.meta.bits
        },
        "other_nbytes": sum(info.nbytes for info in store.checkpoint.tensors.values()),
        "left_out": store.meta.left_out,
    }


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.2f} MB"
