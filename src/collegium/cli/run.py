"""``collegium run``: write text, or chat, with a model that need not fit in memory."""

from __future__ import annotations

import json
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

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


def run(
    model: Annotated[Path, typer.Argument(help="A store (collegium pack), a model folder, or demo.")],
    memory: Memory = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The text to continue; - reads standard input.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk, with the model's own chat template.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="With --chat: how it is to behave.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Above 0; lower is more likely.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="Only the k likeliest tokens; 0 is all.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Only the likeliest that together reach p.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1: less of it.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    context: Context = None,
    experts: Experts = None,
    policy: Policy = "lfu",
    precision: Precision = "fixed",
    predictor: PredictorName = None,
    prefetch: PrefetchWidth = "",
    fit: TraceFile = None,
    arithmetic: Arithmetic = "fast",
    dense_bits: DenseBits = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show where experts come from while it writes.")] = False,
    log: Annotated[
        Path | None, typer.Option("--log", help="Write every request of an expert here, as Parquet.")
    ] = None,
    cost: Annotated[
        Path | None, typer.Option("--cost", help="Measure this machine and model, for collegium simulate --cost.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print how the memory is shared, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON when done; no streaming.")] = False,
) -> None:
    """Write text with a MoE model under a budget of memory; its experts are read from the disk as they are needed.

    Sampling options left out are those of the model's generation config.
    """
    import torch
    from rich.console import Console

    from collegium.assets import model_folder
    from collegium.cli._generation import sampling
    from collegium.cli._model import open_tokenizer
    from collegium.cli._offload import budget_table, open_offloaded
    from collegium.cli._writing import Writer
    from collegium.errors import ConfigError
    from collegium.offload.cost import measure_cost
    from collegium.offload.simulate_times import Stopwatch

    if not plan and (prompt is None) != chat:
        raise ConfigError("give a text to continue (--prompt), or --chat, and not both")
    if system is not None and not chat:
        raise ConfigError("--system is for --chat")
    if as_json and (chat or watch):
        raise ConfigError("--json prints one text when it is done; it does not go with --chat or --watch")
    chosen = sampling(greedy, temperature, top_k, top_p, repetition_penalty)
    tokenizer = None if plan else open_tokenizer(model_folder(model), trust_remote_code=False)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"{model} has no chat template; use --prompt")
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
    )
    with found:
        if plan:
            _print_plan(found.budget, as_json)
            return
        if not as_json:
            Console(stderr=True).print(budget_table(found.budget))
        if seed is not None:
            torch.manual_seed(seed)
        if log is not None:
            found.engine.record_events()
        writer = Writer(found, tokenizer, {"max_new_tokens": max_new_tokens, **chosen}, watch=watch, quiet=as_json)
        times = Stopwatch(found.engine)
        with nullcontext() if cost is None else times:  # it costs a little
            if chat:
                _chat(writer, system)
            else:
                assert prompt is not None
                _once(writer, sys.stdin.read() if prompt == "-" else prompt, as_json)
        if log is not None:
            assert found.engine.log is not None
            found.engine.log.save(log)
        if cost is not None:
            times.cost(measure_cost(cost.absolute().parent)).save(cost)


def _print_plan(budget: Any, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from collegium.cli._offload import budget_table

    if as_json:
        typer.echo(json.dumps({**asdict(budget), "total": budget.total}, indent=2))
    else:
        Console().print(budget_table(budget))


def _once(writer: Any, prompt: str, as_json: bool) -> None:
    start = time.perf_counter()
    with _interrupts(writer):
        text = writer.write(prompt)
    if as_json:
        seconds = time.perf_counter() - start
        record = {"text": text, "seconds": round(seconds, 3), **writer.last, "budget": writer.budget()}
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))


def _chat(writer: Any, system: str | None) -> None:
    """Read lines and answer them until the input ends. Ctrl-C stops an answer; twice it ends the chat."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    typer.echo("An empty line or Ctrl-D ends the chat; Ctrl-C stops an answer.", err=True)
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else input()
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            return
        messages.append({"role": "user", "content": line})
        with _interrupts(writer):
            answer = writer.answer(messages)
        messages.append({"role": "assistant", "content": answer})


class _interrupts:
    """Within the context Ctrl-C stops the text after the token that is being computed; a second one ends all."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __enter__(self) -> None:
        self._before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._stop)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _stop(self, number: int, frame: Any) -> None:
        self._writer.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
