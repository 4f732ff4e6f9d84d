"""``collegium evaluate``: how a model does on held-out text, and how far it is from another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collegium.cli._model import Device, Dtype, TrustRemoteCode

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from collegium.compress.judge_result import DomainScore, Judgement

__all__ = ["run"]

_SHOWN = ("loss/mean", "loss/uncertain", "probability/mean", "entropy/mean", "rank/mean", "top1/mean", "top5/mean")
"""Proxies in the table; --json has all."""


def run(
    model: Annotated[Path, typer.Argument(help="A model folder with a tokenizer, MoE or dense; or demo.")],
    data: Annotated[
        str, typer.Option("--data", help="'local', a folder of texts, a .jsonl or .parquet file, or a text file.")
    ],
    against: Annotated[
        Path | None, typer.Option("--against", help="The model to compare with, such as the one it was made of.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="Judge the model as this plan would leave it, against the model as it is."),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="Judge on this split: train, valid, test; or all for everything.")
    ] = "test",
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, help="So many tokens, the domains sharing equally; else all of the split."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences in a forward.")] = 4,
    sequence_length: Annotated[
        int | None,
        typer.Option("--sequence-length", min=2, help="Tokens in a sequence; 512 if unsaid, or what the model can."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write everything as JSON into this file.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Perplexity and bits per byte by domain; against another model also KL, router agreement and output error.

    collegium evaluate SMALL --data local --against WHOLE --tokens 20000
    """
    from collegium.cli._data import open_data, open_split
    from collegium.cli._judge import judge_folders
    from collegium.cli._model import open_folder
    from collegium.compress.plan import Plan
    from collegium.errors import ConfigError

    if plan is not None and against is not None:
        raise ConfigError("--plan compares a model with and without its experts masked; leave out --against")
    opened = None if plan is None else Plan.load(plan)
    checkpoint = open_folder(model, trust_remote_code=trust_remote_code)
    other = None if against is None else open_folder(against, trust_remote_code=trust_remote_code)
    corpus = open_data(data)
    found = judge_folders(
        checkpoint,
        corpus,
        against=other,
        plan=opened,
        names=(str(model), str(model if against is None else against)),
        split=None if split == "all" else open_split(split),
        tokens=tokens,
        batch_size=batch_size,
        sequence_length=sequence_length,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if out is not None:
        found.save(out)
    if as_json:
        typer.echo(json.dumps(found.record(), indent=2, ensure_ascii=False, allow_nan=False))
        return
    show(found)
    if out is not None:
        typer.echo(f"written to {out}")


def show(found: Judgement) -> None:
    """Print a judgement as tables."""
    from rich.console import Console

    console = Console()
    which = f"{found.model}, experts masked," if found.masked else found.model
    head = f"{which} on {found.data}" + ("" if found.whole is None else f", against {found.whole}")
    console.print(head, highlight=False, markup=False, soft_wrap=True)
    console.print(_domains(found))
    if found.layers:
        console.print(_layers(found))
    console.print(_proxies(found))
    _continuations(found, console)
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _domains(found: Judgement) -> Table:
    table = _table("domain", "tokens", "perplexity", "bits/byte", "loss")
    if found.whole is not None:
        for head in ("other's loss", "difference", "KL", "same top-1"):
            table.add_column(head, justify="right")
    for one in (*found.domains, found.overall):
        bits = "-" if one.bits_per_byte is None else f"{one.bits_per_byte:.3f}"
        cells = [one.domain, f"{one.tokens:,}", f"{one.perplexity:,.2f}", bits, f"{one.loss.value:.4f}"]
        table.add_row(*cells, *(_compared(one) if found.whole is not None else ()))
    return table


def _compared(one: DomainScore) -> list[str]:
    assert one.whole_loss is not None
    assert one.difference is not None
    assert one.kl is not None
    assert one.top1 is not None
    known = one.difference.low == one.difference.low  # not NaN
    spread = f" ({one.difference.low:+.3f} to {one.difference.high:+.3f})" if known else ""
    return [
        f"{one.whole_loss:.4f}",
        f"{one.difference.value:+.4f}{spread}",
        f"{one.kl.value:.4f}",
        f"{one.top1.value:.1%}",
    ]


def _layers(found: Judgement) -> Table:
    table = _table("layer", "experts", "choices still there", "routers agree", "output error")
    table.caption = "both models from the first layer on: a layer's numbers include what differs before it"
    for one in found.layers:
        experts = f"{one.num_experts} of {one.whole_experts}"
        shares = (f"{value.value:.1%}" if value is not None else "-" for value in (one.present, one.agreement))
        error = "-" if one.output_error is None else f"{one.output_error.value:.3f}"
        table.add_row(str(one.layer), experts, *shares, error)
    return table


def _proxies(found: Judgement) -> Table:
    table = _table("token-level proxy", "model")
    if found.whole is not None:
        table.add_column("other", justify="right")
    for name in _SHOWN:
        values = [one[name] for one in (found.proxies, found.whole_proxies) if one]
        table.add_row(name, *(f"{value:.4f}" for value in values))
    return table


def _continuations(found: Judgement, console: Console) -> None:
    for one in found.continuations:
        console.print(f"[bold]{one.domain.replace('[', chr(92) + '[')}[/bold]", highlight=False)
        texts = [("prompt", one.prompt), ("model", one.text)]
        texts += [] if one.whole_text is None else [("other", one.whole_text)]
        for head, text in texts:
            console.print(f"  {head:<7}{' '.join(text.split())}", highlight=False, markup=False, soft_wrap=True)


def _table(first: str, *heads: str) -> Any:
    from rich.table import Table

    table = Table(first)
    for head in heads:
        table.add_column(head, justify="right")
    return table
