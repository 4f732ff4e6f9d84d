"""``collegium simulate``: what a memory too small for all experts would do to a recorded run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from collegium.errors import ConfigError

if TYPE_CHECKING:
    from collegium.cli._simulate import Row

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
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="So many sequences run together, a token of each a pass.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            help="regroup: two batches of --batch are sorted by the experts they use (as --predictor names them, "
            "else as recorded). hybrimoe: experts are divided between the CPU and --device, whose memory is the cache.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="The second processor, as gpu:seconds=0.0004,transfer=12 (seconds an expert, GB/s of the link) or "
            "gpu:gflops=9000,transfer=12.",
        ),
    ] = None,
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
    how far it is from the optimum that knows the future. With a schedule it prints what that saves: regrouped batches
    beside the same ones as they come, and two processors beside each of them alone.
    """
    from collegium.cli._schedules import REGROUPED, saved
    from collegium.cli._simulate import Asked, capacities, open_machine, simulate_all
    from collegium.offload.simulate_passes import Passes
    from collegium.trace import Trace

    asked = Asked(policy or [], predictor, fit, prefetch, prefilled, batch, schedule, device)
    if sweep and schedule is not None:
        raise ConfigError("--sweep draws policies, not schedules; leave out one of --sweep and --schedule")
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
        "passes": rows[0].simulation.by,
        "prompts_unrolled": found.unrolled,
        "expert_bytes": machine.expert_bytes,
        "cost": machine.cost.model_dump(mode="json"),
        **{name: value for name, value in (("batch", batch), ("schedule", schedule), ("device", device)) if value},
    }
    if as_json:
        savings = {"saved": saved(rows)} if rows[-1].schedule == REGROUPED else {}
        record = {**head, **savings, "simulations": [row.record() for row in rows]}
        typer.echo(json.dumps(record, indent=2, allow_nan=False))
        return
    from collegium.cli._simulate_show import show

    show(rows, machine.cost.measured, out)


def _write(rows: list[Row], out: Path, sweep: bool) -> None:
    """Results as JSON and CSV; of a sweep pictures, else the events of each simulation, and the plans of schedules."""
    import csv

    from collegium.files import atomic_file
    from collegium.offload.simulate_hybrid import HybridSimulation, save_plans
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
        name = f"{number}-{row.policy.partition(':')[0]}.parquet"
        row.simulation.log.save(out / f"events-{name}")
        if isinstance(row.simulation, HybridSimulation):
            save_plans(row.simulation.plans, out / f"schedule-{name}")
