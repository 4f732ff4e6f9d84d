"""``collegium serve``: an OpenAI-compatible server, and a chat page, over a model that need not fit in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from collegium.cli._offload import (
    Arithmetic,
    Context,
    DenseBits,
    Experts,
    Memory,
    Policy,
    Precision,
    PredictorName,
    PrefetchWidth,
    TraceFile,
)

__all__ = ["run"]

KEY = "COLLEGIUM_API_KEY"


def run(
    model: Annotated[Path, typer.Argument(help="A store (collegium pack), a model folder, or demo.")],
    memory: Memory = None,
    host: Annotated[str, typer.Option("--host", help="The default is reached from this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option("--name", help="What clients call the model; its folder's name.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help=f"Clients must send what this file holds; or set {KEY}.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="A jinja file in place of the model's own template.")
    ] = None,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests that run together.")] = 4,
    waiting: Annotated[int, typer.Option("--queue", min=0, help="Requests that may wait; more get status 429.")] = 64,
    drain: Annotated[float, typer.Option("--drain", min=0, help="Seconds to finish requests at the end.")] = 30.0,
    context: Context = None,
    experts: Experts = None,
    policy: Policy = "lfu",
    precision: Precision = "fixed",
    predictor: PredictorName = None,
    prefetch: PrefetchWidth = "",
    fit: TraceFile = None,
    arithmetic: Arithmetic = "fast",
    dense_bits: DenseBits = None,
) -> None:
    """Serve a MoE model under a budget of memory: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics.

    A chat page that shows which experts write is at /. Ctrl-C finishes what runs.
    """
    from rich.console import Console

    from collegium.assets import model_folder
    from collegium.cli._model import open_tokenizer
    from collegium.cli._offload import budget_table, open_offloaded
    from collegium.decode import Batcher
    from collegium.serve import build_app, serve

    folder = model_folder(model)
    tokenizer = open_tokenizer(folder, trust_remote_code=False)
    key = _key(api_key_file)
    template = None if chat_template is None else _read(chat_template)
    loopback = host in ("127.0.0.1", "localhost", "::1")
    if not loopback and key is None:
        typer.echo(f"collegium: warning: anybody who reaches {host} can use this server; give --api-key-file", err=True)
    found = open_offloaded(
        model,
        memory=memory,
        experts=experts,
        context=context,
        policy=policy,
        precision=precision,
        predictor=predictor,
        prefetch=prefetch,
        fit=fit,
        arithmetic=arithmetic,
        dense_bits=dense_bits,
        sequences=requests,
    )
    with found:
        Console(stderr=True).print(budget_table(found.budget))
        batcher = Batcher(
            found.model, tokenizer, context=found.context, max_batch=requests, queue=waiting, prefill_chunk=found.chunk
        )
        if batcher.unbatched:
            typer.echo(f"requests run one at a time: {batcher.unbatched}", err=True)
        app = build_app(
            batcher,
            model_name=name or (str(model) if str(model) == "demo" else folder.resolve().name),
            api_key=key,
            engine=found.engine,
            chat_template=template,
            allowed_hosts=["127.0.0.1", "localhost", "[::1]"] if loopback else None,
        )
        serve(app, host, port, drain_seconds=drain, ready=lambda url: typer.echo(f"serving at {url}", err=True))


def _key(file: Path | None) -> str | None:
    from collegium.errors import ConfigError

    key = os.environ.get(KEY) if file is None else _read(file).strip()
    if key == "":
        raise ConfigError(f"the API key in {file or KEY} is empty; nobody could be let in")
    return key


def _read(file: Path) -> str:
    from collegium.errors import ConfigError

    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
