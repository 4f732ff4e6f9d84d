"""What the verbs that run a model from a store share: their options, and opening it with its plan printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collegium.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from collegium.offload.budget import Budget
    from collegium.offload.model import Offloaded

__all__ = [
    "Arithmetic",
    "Context",
    "DenseBits",
    "Experts",
    "Memory",
    "Policy",
    "Precision",
    "PredictorName",
    "PrefetchWidth",
    "TraceFile",
    "budget_table",
    "open_offloaded",
]

Arithmetic = Annotated[
    str,
    typer.Option(
        "--arithmetic",
        help="fast; float32 (what goes into 8-bit and 4-bit experts is not rounded); exact (transformers' own, slow).",
    ),
]
DenseBits = Annotated[
    int | None, typer.Option("--dense-bits", help="8 rounds the weights besides the experts to 8 bits, too.")
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", help="All that the process may hold, such as 6GiB; without it no expert ever leaves."),
]
Context = Annotated[
    int | None, typer.Option("--context", min=2, help="Tokens of prompt and text together; the model's, at most 4096.")
]
Experts = Annotated[
    int | None, typer.Option("--experts", min=1, help="Experts in memory at most, for trying out; as many as fit.")
]
Policy = Annotated[
    str, typer.Option("--policy", help="Which experts stay: NAME or NAME:setting=value,...; `methods --kind cache`.")
]
Precision = Annotated[
    str, typer.Option("--precision", help="Which copy a token gets; `methods --kind precision`. fixed changes nothing.")
]
PredictorName = Annotated[
    str | None, typer.Option("--predictor", help="Read ahead what this expects; `methods --kind predictor`.")
]
PrefetchWidth = Annotated[
    str, typer.Option("--prefetch", help="How much is read ahead: width=N|adaptive,depth=N|adaptive,...")
]
TraceFile = Annotated[Path | None, typer.Option("--fit", help="A trace of this model that --predictor is fitted on.")]


def open_offloaded(
    model: Path,
    *,
    memory: str | None,
    experts: int | None,
    context: int | None,
    policy: str,
    precision: str,
    predictor: str | None,
    prefetch: str,
    fit: Path | None,
    sequences: int = 1,
    arithmetic: str = "fast",
    dense_bits: int | None = None,
) -> Offloaded:
    """The model, ready to run; what goes on is said on standard error.

    Raises what `load_offloaded` does, and ConfigError for a method or setting that is not there.
    """
    from rich.console import Console

    from collegium.assets import model_folder
    from collegium.offload.model import load_offloaded
    from collegium.offload.policies import find_policy
    from collegium.offload.precision import find_precision
    from collegium.offload.prefetch import find_prefetch

    if predictor is None and fit is not None:
        raise ConfigError("--fit is what a --predictor learns from; name one, or leave it out")
    console = Console(stderr=True)
    with console.status("opening the model") as status:
        return load_offloaded(
            model_folder(model),
            memory=memory,
            experts=experts,
            context=context,
            say=status.update,
            sequences=sequences,
            policy=find_policy(policy),
            precision=find_precision(precision),
            predictor=None if predictor is None else _maker(predictor, fit),
            prefetch=find_prefetch(prefetch),
            kind=arithmetic,
            dense_bits=dense_bits,
        )


def _maker(name: str, fit: Path | None) -> Callable[[Any, Any], Any]:
    """A function that makes the predictor once the model is there."""
    from collegium.offload.predictors import find_predictor

    settings = find_predictor(name)
    if settings.needs_trace and fit is None:
        raise ConfigError(f"--predictor {name} learns from a trace; record one (collegium trace) and give it as --fit")

    def make(model: Any, geometry: Any) -> Any:
        from collegium.offload.gates import ModelGates
        from collegium.trace import Trace

        trace = None if fit is None else Trace.open(fit)
        gates = ModelGates(model) if settings.needs_gates else None
        return settings.build(geometry, trace=trace, gates=gates)

    return make


def budget_table(budget: Budget) -> Table:
    """The plan of memory, for a person."""
    from rich.table import Table

    table = Table("what", "MiB", title="memory", title_justify="left")
    table.columns[1].justify = "right"
    for name, nbytes in budget.rows():
        table.add_row(name, f"{nbytes / 2**20:,.0f}")
    of = "" if budget.memory is None else f" of {budget.memory / 2**20:,.0f}"
    table.add_row("in all", f"{budget.total / 2**20:,.0f}{of}", style="bold")
    return table
