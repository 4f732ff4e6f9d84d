"""``collegium import-trace``: routing that another program recorded, as a trace; or as statistics, if it is counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collegium.cli._model import Device, Dtype, TrustRemoteCode

if TYPE_CHECKING:
    import numpy as np

__all__ = ["run"]


def run(
    format: Annotated[str, typer.Argument(help="sglang, vllm, llama.cpp or router-logits.")],
    files: Annotated[list[Path], typer.Argument(help="What was recorded; several files become one trace, in order.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the trace, or the statistics.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder of the model that was recorded; its config is enough.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Decoder layers that the files hold, in their order, such as 3-61 or 1,3,5."),
    ] = None,
    num_experts: Annotated[
        int | None, typer.Option("--num-experts", min=1, help="Experts of a layer, if no model is given.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Experts of a token, if no model is given.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option("--tokens", help="A text file with the token ids of all rows, where the format has none."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Read routing recorded by SGLang, vLLM, llama.cpp or transformers into a trace.

    sglang reads the expert-distribution recorder's per_token files, vllm API responses with routed_experts, llama.cpp
    the CSV of moe-trace, router-logits saved forwards with input_ids and router_logits (the only format that loads the
    model's weights). Whatever a format does not record is said on standard error and kept in the trace.

    sglang's stat and per_pass files hold counts instead of tokens. They become statistics, whose load collegium measure
    and compare show.
    """
    from collegium.assets import model_folder
    from collegium.measure.imported import import_statistics
    from collegium.trace.importers import Known, import_trace, read_model_facts

    folder = None if model is None else model_folder(model)
    network = None
    if folder is not None and format == "router-logits":
        from collegium.cli._model import open_folder, open_model

        checkpoint = open_folder(folder, trust_remote_code=trust_remote_code)
        network = open_model(checkpoint.folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    known = Known(
        model=None if folder is None else read_model_facts(folder, str(model)),
        network=network,
        layers=None if layers is None else _numbers(layers),
        num_experts=num_experts,
        top_k=top_k,
        tokens=None if tokens is None else _token_ids(tokens),
    )
    counts = import_statistics(format, files, out, known, overwrite=overwrite)
    if counts is None:
        trace, notes = import_trace(format, files, out, known, overwrite=overwrite)
        record: dict[str, Any] = {"trace": str(out), "tokens": len(trace), "layers": trace.layers, "notes": notes}
        words = f"{len(trace):,} tokens of {len(trace.layers)} layers in {out}"
    else:
        statistics, said = counts
        notes, seen = list(said), statistics.meta.tokens or None
        record = {"statistics": str(out), "tokens": seen, "layers": statistics.layers, "notes": notes}
        many = "tokens" if seen is None else f"{seen:,} tokens"
        words = f"the files hold counts: statistics of {many} and {len(statistics.layers)} layers in {out}"
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(json.dumps(record, indent=2) if as_json else words)


def _numbers(text: str) -> tuple[int, ...]:
    """``"0,2-4"`` -> ``(0, 2, 3, 4)``. Raises ConfigError."""
    from collegium.errors import ConfigError

    found: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"--layers must be numbers and spans such as 0,2-5, not {text!r}")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def _token_ids(path: Path) -> np.ndarray[Any, Any]:
    """Whole numbers separated by commas or white space. Raises DataError."""
    import numpy as np

    from collegium.errors import DataError

    try:
        words = path.read_text(encoding="utf-8").replace(",", " ").split()
        ids = np.array([int(word) for word in words], np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} must hold token ids separated by commas or white space: {error}") from error
    if ids.size and (ids.min() < 0 or ids.max() >= 1 << 32):
        raise DataError(f"{path} holds {int(ids.min())} to {int(ids.max())}, and token ids are from 0 to 2^32 - 1")
    return ids
