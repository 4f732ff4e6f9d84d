"""``collegium corpus``: what a corpus holds."""

from __future__ import annotations

import json
from typing import Annotated

import typer

__all__ = ["run"]


def run(
    spec: Annotated[str, typer.Argument(help="'local', a folder, or a .jsonl or .parquet file.")] = "local",
    text: Annotated[str | None, typer.Option(help="Field with the text, in a file with fields.")] = None,
    domain: Annotated[str | None, typer.Option(help="Field with the domain, in a file with fields.")] = None,
    sample: Annotated[str | None, typer.Option("--sample", help="Show the start of a document of this domain.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show how much text a corpus has in each domain and split, and a sample of it."""
    from collegium.data import open_corpus
    from collegium.data.document import SPLITS
    from collegium.errors import ConfigError

    corpus = open_corpus(spec, text=text, domain=domain)
    if sample is not None and sample not in corpus.domains:
        raise ConfigError(f"{corpus.name} has no domain {sample!r}; it has {', '.join(corpus.domains)}")
    shown = next((d for d in corpus.documents() if d.domain == sample), None)
    if as_json:
        record = corpus.summary()
        if shown:
            record["sample"] = {"name": shown.name, "domain": shown.domain, "text": shown.text[:1000]}
        typer.echo(json.dumps(record, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    summary = corpus.summary()
    table = Table("domain", title=f"{corpus.name}: bytes (documents)", caption=f"fingerprint {corpus.fingerprint()}")
    for split in SPLITS:
        table.add_column(split, justify="right")
    for name, sizes in summary["domains"].items():
        table.add_row(name, *(f"{sizes[split]['bytes']:,} ({sizes[split]['documents']:,})" for split in SPLITS))
    console = Console()
    console.print(table)
    for reason, count in corpus.skipped.items():
        console.print(f"left out: {count:,} {reason}")
    if shown:
        console.rule(shown.name)
        console.print(shown.text[:1000], markup=False, highlight=False)
