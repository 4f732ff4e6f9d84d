"""``collegium simulate``: what a memory too small for all experts would do to a recorded run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collegium.cli._simulate import Row
    from collegium.offload.simulate_passes import Passes

__all__ = ["run"]


def run(
    trace: Annotated[Path, typer.Argument(help="A trace folder.")],
    memory: Annotated[str | None, typer.Option("--memory", help="Memory for experts alone, such as 2GiB.")] = None,
    experts: Annotated[
        int | None, typer.Option("--experts", min=1, help="Instead: experts it holds, all layers.")
    ] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="Instead: times the experts of one token.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help="A cache policy, as NAME or NAME:setting=value,...; repeatable. Else all."),
    ] = None,
    expert_bytes: Annotated[int | None, typer.Option("--expert-bytes", min=1, help="Bytes of one expert.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Instead: the traced model, a folder, a packed store, or demo.")
    ] = None,
    predictor: Annotated[
        str | None, typer.Option("--predictor", help="Read ahead what this predictor names, as NAME:setting=value,...")
    ] = None,
    fit: Annotated[
        Path | None, typer.Option("--fit", help="Trace of other texts that the predictor is fitted on.")
    ] = None,
    prefetch: Annotated[
        str, typer.Option("--prefetch", help="How much is read ahead: experts a layer, or setting=value,...")
    ] = "",
    cost: Annotated[
        Path | None,
        typer.Option("--cost", help="Times of a machine (JSON). Else the disk under the trace is measured."),
    ] = None,
    passes: Annotated[
        Literal["auto", "tokens", "sequences", "recorded"],
        typer.Option("--passes", help="What runs together: a token, a prompt of one sequence, or all of a step."),
    ] = "auto",
    prefilled: Annotated[
        bool, typer.Option("--prefilled", help="First touches cost nothing while there is room, as if it were full.")
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="All memories from one token's experts to all; draws it.")
    ] = False,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Only so many tokens.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for results, events and pictures; made if missing.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Simulate cache policies, with or without reading ahead, over a trace.

    Prints for each policy how many requests it serves from memory, what it reads, how long computation would wait, and
    how far it is from the optimum that knows the future.
    """
    from collegium.cli._simulate import Asked, capacities, open_machine, simulate_all
    from collegium.offload.simulate_passes import Passes
    from collegium.trace import Trace

    asked = Asked(policy or [], predictor, fit, prefetch, prefilled)
    opened = Trace.open(trace)
    machine = open_machine(opened, expert_bytes, model, cost)
    found = Passes(opened, passes, tokens, probabilities=True)
    budgets = capacities(found.geometry, machine.expert_bytes, memory, experts, ratio, sweep)
    rows = simulate_all(asked, opened, found, machine, budgets, model)
    if out is not None:
        _write(rows, out, sweep)
    head = {
        "trace": str(trace),
        "tokens": len(found.tokens),
        "passes": found.by,
        "prompts_unrolled": found.unrolled,
        "expert_bytes": machine.expert_bytes,
        "cost": machine.cost.model_dump(mode="json"),
    }
    if as_json:
        record = {**head, "simulations": [row.record() for row in rows]}
        typer.echo(json.dumps(record, indent=2, allow_nan=False))
        return
    _show(rows, found, machine.cost.measured, out)


def _show(rows: list[Row], passes: Passes, measured: str, out: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    totals = [row.simulation.summary() for row in rows]
    kinds = ["hit", "prefetched", "late", "miss"]
    if not any(found["prefetched"] or found["late"] for found in totals):
        kinds = ["hit", "miss"]
    table = Table("policy", "experts", *kinds, "MB/token", "stall ms", "to OPT", "tokens/s")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for row, found in zip(rows, totals, strict=True):
        distance = found["distance_to_opt"]
        table.add_row(
            row.policy,
            f"{found['experts']:,}",
            *(f"{found[kind]:.1%}" for kind in kinds),
            f"{(found['bytes_per_token'] or 0) / 1e6:,.3f}",
            f"{found['stall_ms_per_token']:,.3f}",
            "" if distance is None else f"{distance:.1%}",
            f"{found['tokens_per_second']:,.1f}",
        )
    console = Console()
    console.print(table)
    words = {
        "tokens": "every token is a pass of its own",
        "sequences": "a prompt of one sequence is a pass, then each of its tokens",
        "recorded": "a pass is what one recorded step computed",
    }[passes.by]
    note = "; prompts were unrolled token by token, as if they had been generated" if passes.unrolled else ""
    console.print(f"{len(passes.tokens):,} tokens, {passes.geometry.num_layers} layers; {words}{note}", highlight=False)
    console.print("to OPT: hit rate of the optimum with one pool of the same size, minus this one's", highlight=False)
    console.print(f"times: {measured}", highlight=False)
    if out is not None:
        console.print(f"written to {out}", highlight=False)


def _write(rows: list[Row], out: Path, sweep: bool) -> None:
    """Results as JSON and CSV; of a sweep pictures, else the events of each simulation."""
    import csv

    from collegium.files import atomic_file
    from collegium.report.figures.offload import write_sweep

    with atomic_file(out / "simulations.json") as partial:
        partial.write_text(json.dumps([row.record() for row in rows], indent=1, allow_nan=False), encoding="utf-8")
    flat = [row.flat() for row in rows]
    with atomic_file(out / "simulations.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
    if sweep:
        write_sweep(flat, out)
        return
    for number, row in enumerate(rows):
        row.simulation.log.save(out / f"events-{number}-{row.policy.partition(':')[0]}.parquet")
