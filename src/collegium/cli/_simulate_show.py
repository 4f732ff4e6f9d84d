"""What ``simulate`` prints for a person."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from collegium.cli._schedules import saved
from collegium.offload.cache import Found
from collegium.offload.simulate_hybrid import HybridSimulation

if TYPE_CHECKING:
    from collegium.cli._simulate import Row

__all__ = ["show"]

_WORDS = {
    "tokens": "every token is a pass of its own",
    "sequences": "a prompt of one sequence is a pass, then each of its tokens",
    "recorded": "a pass is what one recorded step computed",
    "batches": "a pass is a token of each sequence of a batch",
}


def show(rows: Sequence[Row], measured: str, out: Path | None) -> None:
    """Tables, and how to read them.

    Args:
        measured: where the times come from.
        out: where files were written.
    """
    console = Console()
    divided = [(row, row.simulation) for row in rows if isinstance(row.simulation, HybridSimulation)]
    console.print(_divided(divided) if divided else _cached(rows))
    if divided:
        console.print(_layers(divided))
    elif rows[0].schedule:
        console.print(_saved(rows))
    one = rows[0].simulation
    note = "; prompts were unrolled token by token, as if they had been generated" if one.unrolled else ""
    layers = one.geometry.num_layers
    console.print(f"{one.tokens:,} tokens, {layers} layers; {_WORDS[one.by]}{note}", highlight=False)
    if divided:
        console.print(
            "stall: the second processor waits for the link. Its times are those you gave, none was measured",
            highlight=False,
        )
    else:
        console.print(
            "to OPT: hit rate of the optimum with one pool of the same size, minus this one's", highlight=False
        )
    console.print(f"times: {measured}", highlight=False)
    if out is not None:
        console.print(f"written to {out}", highlight=False)


def _table(*columns: str, names: int = 1, title: str | None = None) -> Table:
    """A table whose first columns are names and whose others are numbers."""
    table = Table(*columns, title=title, title_justify="left")
    table.columns[0].no_wrap = True
    for column in table.columns[names:]:
        column.justify = "right"
    return table


def _rate(tokens_per_second: float) -> str:
    """Short, as terminals are narrow."""
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:,.1f}"


def _cached(rows: Sequence[Row]) -> Table:
    totals = [row.simulation.summary() for row in rows]
    kinds = ["hit", "prefetched", "late", "miss"]
    if not any(found["prefetched"] or found["late"] for found in totals):
        kinds = ["hit", "miss"]
    named = ["policy", "schedule"] if rows[0].schedule else ["policy"]
    table = _table(*named, "experts", *kinds, "MB/token", "stall ms", "to OPT", "tokens/s", names=len(named))
    for row, found in zip(rows, totals, strict=True):
        distance = found["distance_to_opt"]
        table.add_row(
            row.policy,
            *([row.schedule] if row.schedule else []),
            f"{found['experts']:,}",
            *(f"{found[kind]:.1%}" for kind in kinds),
            f"{(found['bytes_per_token'] or 0) / 1e6:,.3f}",
            f"{found['stall_ms_per_token']:,.3f}",
            "" if distance is None else f"{distance:.1%}",
            _rate(float(found["tokens_per_second"] or 0)),
        )
    return table


def _saved(rows: Sequence[Row]) -> Table:
    """What regrouping saves; below 0 where it costs."""
    table = _table(
        "policy", "distinct experts", "bytes saved", "stall saved", "tokens/s", title="what regrouping saves"
    )
    for one in saved(rows):
        before, after = one["distinct_experts"]
        shares = ("none" if one[key] is None else f"{one[key]:.1%}" for key in ("bytes", "stall"))
        table.add_row(one["policy"], f"{before:.2f} -> {after:.2f}", *shares, f"{one['speedup']:.2f} x")
    return table


def _divided(rows: Sequence[tuple[Row, HybridSimulation]]) -> Table:
    columns = ("policy", "on", "experts", "there", "moved", "on cpu", "MB/token", "stall ms", "experts ms", "tokens/s")
    table = _table(*columns, names=2)
    for row, one in rows:
        found = one.summary()
        on_fast = 1 - one.slow_share if one.requests else 0.0
        table.add_row(
            row.policy,
            row.schedule,
            f"{found['experts']:,}",
            f"{on_fast * one.hit_rate:.1%}",
            f"{on_fast * one.rate(Found.MISS, Found.LATE):.1%}",
            f"{one.slow_share:.1%}",
            f"{(found['bytes_per_token'] or 0) / 1e6:,.3f}",
            f"{found['stall_ms_per_token']:,.3f}",
            f"{found['expert_ms_per_token']:,.3f}",
            _rate(float(found["tokens_per_second"] or 0)),
        )
    return table


def _layers(rows: Sequence[tuple[Row, HybridSimulation]]) -> Table:
    """Milliseconds a token of each layer's experts, of the policy that is fastest with both processors."""
    best = max((pair for pair in rows if pair[1].on == "both"), key=lambda pair: pair[1].tokens_per_second)[0].policy
    both, fast, slow = ((row.schedule, one) for row, one in rows if row.policy == best)
    names = [f"{name} ms" for name, _ in (both, fast, slow)]
    waits = [f"{name} stall" for name, _ in (both, fast)]
    table = _table("layer", *names, *waits, "moved", "on cpu", title=f"{best}: ms a token of each layer's experts")
    found = both[1]
    for at, layer in enumerate(found.geometry.layers):
        moved = int(found.found[at, [Found.MISS, Found.LATE]].sum())
        slow_experts = int(found.slow_experts[at])
        asked = max(int(found.found[at, : Found.SKIP].sum()) + slow_experts, 1)
        table.add_row(
            str(layer),
            *(f"{1000 * one.seconds[at] / max(one.tokens, 1):,.3f}" for _, one in (both, fast, slow)),
            *(f"{1000 * one.stall[at] / max(one.tokens, 1):,.3f}" for _, one in (both, fast)),
            f"{moved / asked:.1%}",
            f"{slow_experts / asked:.1%}",
        )
    return table
