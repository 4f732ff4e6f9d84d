"""``collegium calibrate``: learn about each expert of a checkpoint, one layer in memory at a time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collegium.cli._model import Dtype

if TYPE_CHECKING:
    from collegium.measure.collect import Collector
    from collegium.measure.statistics import Statistics

__all__ = ["run"]


def run(
    model: Annotated[Path, typer.Argument(help="A folder with a MoE model and its tokenizer; or demo.")],
    data: Annotated[
        str, typer.Option("--data", help="'local', a folder of texts, a .jsonl or .parquet file, or a text file.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the statistics.")],
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, help="So many tokens, the domains sharing equally; else all of the data."),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Only this split: train, valid or test.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences in a forward.")] = 8,
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", min=1, help="Longer documents are cut into sequences of this length.")
    ] = 512,
    collect: Annotated[
        list[str] | None,
        typer.Option(
            "--collect", help="A collector, or a score (of experts or of neurons) whose collectors are wanted."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with an unfinished run, or start again and replace it.")
    ] = True,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Run texts through a checkpoint, one decoder layer in memory at a time, and keep what that tells of each expert.

    The statistics are what importance scores and plans are made from. Beside OUT there is OUT.partial until the run is
    done; Ctrl-C or a kill loses one layer at most, and the same command goes on from there. What needs gradients, such
    as heapr, takes about three times as long, and meanwhile keeps the hidden states of every layer on the disk.

        collegium calibrate MODEL --data local --collect reap --collect heapr --out STATS

        torchrun --nproc-per-node 2 -m collegium calibrate MODEL --data local --out STATS
    """
    import os

    from collegium.cli._data import open_data, open_split
    from collegium.cli._model import DTYPES, layer_progress, open_folder, open_tokenizer
    from collegium.compress.stream import calibrate, check_target
    from collegium.data import document_batches
    from collegium.data.tokenize import tokenizer_fingerprint
    from collegium.errors import ConfigError

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    check_target(out, resume=resume)  # before a large corpus is read for nothing
    collectors = _collectors(collect)
    checkpoint = open_folder(model, trust_remote_code=False)
    tokenizer = open_tokenizer(checkpoint.folder, trust_remote_code=False)
    corpus = open_data(data)
    batches = document_batches(
        corpus,
        tokenizer,
        open_split(split),
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_tokens=tokens,
    )
    start, first = time.perf_counter(), os.environ.get("RANK", "0") == "0"
    with layer_progress() as bar:
        task = bar.add_task("reading", total=None)

        def progress(done: int, steps: int, share: float) -> None:
            bar.update(task, description=f"step {done + 1} of {steps}", completed=done + share, total=steps)

        try:
            found = calibrate(
                checkpoint,
                batches,
                collectors,
                out,
                name=str(model),
                data=f"{corpus.name} ({corpus.fingerprint()}), split {split or 'all'}, "
                f"{batch_size} x {sequence_length}",
                tokenizer=tokenizer_fingerprint(tokenizer),
                domains=corpus.domains,
                dtype=dtype or "auto",
                max_tokens=tokens,
                resume=resume,
                progress=progress if first else None,
            )
        except KeyboardInterrupt:
            typer.echo(f"stopped; the finished layers are in {out}.partial, the same command goes on", err=True)
            raise typer.Exit(130) from None
    if first:
        _report(found, out, time.perf_counter() - start, as_json)


def _collectors(names: list[str] | None) -> list[Collector]:
    """Collectors of these names, or of scores of these names; the defaults if there are none."""
    from collegium.compress.collectors import COLLECTORS, DEFAULTS, collectors_for
    from collegium.compress.importance import importances
    from collegium.compress.neurons import neuron_scores
    from collegium.errors import ConfigError

    kinds = {one.name: one for one in COLLECTORS}
    if not names:
        return [kind() for kind in DEFAULTS]
    scores = [one.name for one in importances()]
    neurons = {one.name: {*one.needs, "down_max"} for one in neuron_scores() if one.needs}
    chosen: dict[str, Collector] = {}
    for name in names:
        if name in kinds:
            found = [kinds[name]()]
        elif name in neurons:
            found = [kind() for kind in COLLECTORS if neurons[name] & {entry.name for entry in kind.statistics}]
        elif name in scores:
            found = collectors_for(name)
        else:
            raise ConfigError(
                f"no collector or score is named {name!r}; the collectors are {', '.join(kinds)}, the scores "
                f"{', '.join([*scores, *neurons])}"
            )
        chosen |= {one.name: one for one in found}
    return list(chosen.values())


def _report(statistics: Statistics, out: Path, seconds: float, as_json: bool) -> None:
    coverage = statistics.coverage()
    layers = [
        {
            "layer": one.layer,
            "experts": len(one.tokens),
            "fewest": int(one.tokens.min()),
            "median": int(one.tokens.median()),
            "most": int(one.tokens.max()),
            "starved": list(one.starved),
        }
        for one in coverage
    ]
    by_domain = {name: int(statistics.get(statistics.layers[0], "n_tokens", name)) for name in statistics.meta.domains}
    record = {
        "statistics": str(out),
        "tokens": statistics.meta.tokens,
        "domains": by_domain,
        "collectors": list(statistics.meta.collectors),
        "layers": layers,
        "starved": sum(len(one.starved) for one in coverage),
        "bytes": sum(file.stat().st_size for file in out.iterdir()),
        "seconds": round(seconds, 1),
    }
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    typer.echo(
        f"{record['tokens']:,} tokens through {statistics.layers[-1] + 1} layers in {record['seconds']:,} s; "
        f"statistics in {out} ({record['bytes']:,} bytes)"
    )
    for name, count in by_domain.items():
        typer.echo(f"  {name}: {count:,}")
    _coverage_table(layers)
    _starved(coverage)


def _coverage_table(layers: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "experts", "fewest", "median", "most", "starved", title="tokens an expert saw")
    for column in table.columns:
        column.justify = "right"
    for one in layers:
        values = [one["layer"], one["experts"], one["fewest"], one["median"], one["most"], len(one["starved"])]
        table.add_row(*(f"{value:,}" for value in values))
    Console().print(table)


def _starved(coverage: list[Any]) -> None:
    """Name the experts that saw too few tokens."""
    from collegium.measure.statistics import STARVED

    names = [f"{one.layer}.{expert}" for one in coverage for expert in one.starved]
    if names:
        shown = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
        typer.echo(
            f"{len(names)} experts saw fewer than {STARVED} tokens, so what is known of them says little "
            f"(layer.expert): {shown}"
        )
