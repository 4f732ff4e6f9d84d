"""``collegium trace``: run a model over a corpus and record where every token goes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collegium.cli._model import Device, Dtype, TrustRemoteCode

if TYPE_CHECKING:
    from collegium.trace import Trace

__all__ = ["run"]


def run(
    model: Annotated[Path, typer.Argument(help="A folder with a MoE model and its tokenizer; or demo.")],
    data: Annotated[
        str, typer.Option("--data", help="'local', a folder of texts, a .jsonl or .parquet file, or a text file.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the trace.")],
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, help="So many tokens, the domains sharing equally; else all of the data."),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Only this split: train, valid or test.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences in a forward.")] = 8,
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", min=1, help="Longer documents are cut into sequences of this length.")
    ] = 512,
    logits: Annotated[bool, typer.Option("--logits", help="Also store the routers' logits.")] = False,
    gate_inputs: Annotated[
        float, typer.Option("--gate-inputs", help="Share of tokens (0 to 1) whose router inputs are stored too.")
    ] = 0.0,
    dropped: Annotated[
        bool, typer.Option("--dropped", help="Also store the experts that a capacity limit kept tokens from.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=0, help="Also generate so many tokens after each sequence.")
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a trace that was cut short.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a trace that is there.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Record the routing of a model over a corpus: every token, every MoE layer, with domains and documents.

    The trace is a folder of Parquet parts and can be read while it grows. Ctrl-C keeps what is there; --resume goes on.
    """
    from collegium.cli._data import open_data, open_split
    from collegium.cli._model import open_folder, open_model, open_tokenizer, token_progress
    from collegium.data import document_batches
    from collegium.data.tokenize import tokenizer_fingerprint
    from collegium.errors import ConfigError
    from collegium.trace import Trace, record, record_generate
    from collegium.trace.run import check_target

    if max_new_tokens and resume:
        raise ConfigError("--resume cannot continue generated text; leave out --max-new-tokens, or start again")
    there = check_target(out, resume=resume, overwrite=overwrite)  # before a large model is read for nothing
    checkpoint = open_folder(model, trust_remote_code=trust_remote_code)
    tokenizer = open_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
    corpus = open_data(data)
    network = open_model(checkpoint.folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    batches = document_batches(
        corpus,
        tokenizer,
        open_split(split),
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_tokens=tokens,
        left=max_new_tokens > 0,
    )
    settings: dict[str, Any] = {
        "name": str(model),
        "fingerprint": checkpoint.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": f"{corpus.name} ({corpus.fingerprint()}), split {split or 'all'}, {batch_size} x {sequence_length}"
        + (f", {tokens} tokens shared among domains" if tokens and len(corpus.domains) > 1 else ""),
        "domains": corpus.domains,
        "logits": logits,
        "gate_inputs": gate_inputs,
        "dropped": dropped,
        "overwrite": overwrite,
        "max_tokens": tokens,
    }
    before = len(Trace.open(out)) if there and resume else 0
    start = time.perf_counter()
    with token_progress() as progress:
        bar = progress.add_task("tracing", total=tokens, completed=before)
        settings["progress"] = lambda count: progress.advance(bar, count)
        try:
            if max_new_tokens:
                found = record_generate(
                    network, _checked(batches, network), out, max_new_tokens=max_new_tokens, **settings
                )
            else:
                found = record(network, _checked(batches, network), out, resume=resume, **settings)
        except KeyboardInterrupt:
            go_on = "" if max_new_tokens else ", --resume continues it"
            typer.echo(f"stopped; what was recorded is in {out}{go_on}", err=True)
            raise typer.Exit(130) from None
    _report(found, (len(found) - before) / (time.perf_counter() - start), as_json)


def _report(trace: Trace, rate: float, as_json: bool) -> None:
    import numpy as np

    domains = np.bincount(trace.column("domain"), minlength=len(trace.meta.domains)).tolist()
    record = {
        "trace": str(trace.folder),
        "tokens": len(trace),
        "tokens_per_second": round(rate, 1),
        "layers": trace.layers,
        "domains": dict(zip(trace.meta.domains, domains, strict=True)),
        "bytes": sum(file.stat().st_size for file in trace.files),
    }
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    typer.echo(
        f"{len(trace):,} tokens of {len(trace.layers)} layers in {trace.folder} ({record['bytes']:,} bytes, "
        f"{record['tokens_per_second']:,} tokens/s)"
    )
    for name, count in zip(trace.meta.domains, domains, strict=True):
        typer.echo(f"  {name}: {count:,}")


def _checked(batches: Iterator[dict[str, Any]], network: Any) -> Iterator[dict[str, Any]]:
    from collegium.cli._model import check_ids

    for batch in batches:
        check_ids(int(batch["input_ids"].max()), network)
        yield batch
