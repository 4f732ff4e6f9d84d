"""``collegium demo``: the shipped MoE model generates, is compared with its dense twin, is traced and read."""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from collegium.data import Corpus, Packed
    from collegium.measure import DomainInformation, Load
    from collegium.trace import Trace

__all__ = ["run"]

BYTES_PER_DOMAIN = 1_000_000
"""Of this machine's own files; a few percent of it is held out, and only that is shown to the models."""
SEQUENCE = 256
PROMPT_TOKENS = 32


def run(
    out: Annotated[Path, typer.Option("--out", help="Folder for the trace, report and figures.")] = Path("demo"),
    tokens: Annotated[int, typer.Option("--tokens", min=1024, help="Tokens to trace, shared among domains.")] = 16_384,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to generate for each domain.")] = 40,
    seed: Annotated[int, typer.Option("--seed", help="Of the generated text.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of tables.")] = False,
) -> None:
    """See a real MoE language model at work: text, held-out quality against a dense twin, routing, a report.

    Everything is computed here and now, from the models inside the package and this machine's own files.
    """
    from rich.console import Console

    from collegium.assets import SHIPPED
    from collegium.cli._model import open_model, open_tokenizer
    from collegium.data import open_corpus, pack

    console = Console(stderr=as_json)
    start = time.perf_counter()
    options: dict[str, Any] = {"dtype": "float32", "device": None, "trust_remote_code": False}
    moe = open_model(SHIPPED["demo"], **options)
    dense = open_model(SHIPPED["demo-dense"], **options)
    tokenizer = open_tokenizer(SHIPPED["demo"], trust_remote_code=False)
    with console.status("collecting this machine's own files (what the models were not trained on is used)"):
        corpus = open_corpus("local", max_bytes_per_domain=BYTES_PER_DOMAIN)
        with tempfile.TemporaryDirectory() as scratch:
            packed = pack(corpus, tokenizer, "valid", SEQUENCE, scratch, by_domain=True)
            _generate(console, moe, tokenizer, corpus, new_tokens, seed)
            scores = {"moe": _score(moe, packed, tokenizer), "dense": _score(dense, packed, tokenizer)}
            trace = _trace(moe, tokenizer, corpus, out / "trace", tokens)
        results = _read(trace, moe, tokenizer, out)
    results["bits_per_byte"] = scores
    results["seconds"] = round(time.perf_counter() - start, 1)
    if as_json:
        typer.echo(json.dumps(_plain(results), indent=2))
        return
    _show_scores(console, scores)
    _show_load(console, results["load"])
    _show_domains(console, results["information"])
    _show_files(console, out, len(trace), results["seconds"])


def _generate(console: Console, model: Any, tokenizer: Any, corpus: Corpus, new_tokens: int, seed: int) -> None:
    """Continue the start of one held-out document of each domain."""
    import torch
    from rich.text import Text

    from collegium.data import encode_texts

    for domain in corpus.domains:
        # the longest one: short documents are over before the model has seen what they are
        text = max((d.text for d in corpus.documents("valid") if d.domain == domain), key=len, default="")
        prompt = encode_texts(tokenizer, [text])[0][:PROMPT_TOKENS]
        if not prompt:
            continue
        ids = torch.tensor([[tokenizer.bos_token_id, *prompt]])
        torch.manual_seed(seed)
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=True,
                temperature=0.7,
                top_p=0.9,
                pad_token_id=tokenizer.pad_token_id,
            )
        written = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        console.rule(f"[bold]{domain}[/bold]", align="left")
        console.print(Text(tokenizer.decode(prompt), style="dim"), Text(written, style="bold"), sep="", end="\n\n")


def _score(model: Any, packed: Packed, tokenizer: Any) -> dict[str, float]:
    """Bits per byte of held-out text by domain, and of all of it."""
    from collegium.data import token_bytes
    from collegium.train import evaluate

    found = evaluate(model, packed, token_bytes(tokenizer), batch_size=16, sequences_per_domain=24)
    return {**found.bits_per_byte, "all": found.overall}


def _trace(model: Any, tokenizer: Any, corpus: Corpus, folder: Path, tokens: int) -> Trace:
    """Trace held-out documents, as many tokens of each domain."""
    from collegium.assets import SHIPPED
    from collegium.cli._model import token_progress
    from collegium.data import document_batches
    from collegium.data.tokenize import tokenizer_fingerprint
    from collegium.models.checkpoint import open_checkpoint
    from collegium.trace import record

    batches = document_batches(corpus, tokenizer, "valid", sequence_length=SEQUENCE, batch_size=8, max_tokens=tokens)
    with token_progress() as progress:
        bar = progress.add_task("tracing", total=tokens)
        return record(
            model,
            batches,
            folder,
            name="demo",
            fingerprint=open_checkpoint(SHIPPED["demo"]).fingerprint,
            tokenizer=tokenizer_fingerprint(tokenizer),
            data=f"{corpus.name} ({corpus.fingerprint()}), held-out text, rows of {SEQUENCE} tokens",
            domains=corpus.domains,
            logits=True,
            gate_inputs=0.1,
            overwrite=True,
            progress=lambda count: progress.advance(bar, count),
        )


def _read(trace: Trace, model: Any, tokenizer: Any, out: Path) -> dict[str, Any]:
    """Measure the trace; write the report and its figures."""
    from collegium.assets import SHIPPED
    from collegium.models.checkpoint import open_checkpoint
    from collegium.models.summary import summarize
    from collegium.report import measure, write_figures, write_report

    measured = measure(trace, model=model)
    summary = summarize(open_checkpoint(SHIPPED["demo"]))
    write_report(trace, out / "report.html", tokenizer=tokenizer, summary=summary, measured=measured)
    write_figures(trace, out / "figures", measured=measured)
    return {"load": measured.get("load"), "information": measured.get("domains"), "tokens": len(trace)}


def _plain(results: dict[str, Any]) -> dict[str, Any]:
    loads: list[Load] = results["load"]
    information: list[DomainInformation] = results["information"]
    layers = [
        {
            "layer": at.layer,
            "counts": at.counts.tolist(),
            "max_violation": at.max_violation.value,
            "entropy_bits": at.entropy.value,
            "dead": list(at.dead),
            "domain_information_bits": found.bits.value,
            "domain_information_shuffled_bits": found.control,
        }
        for at, found in zip(loads, information, strict=True)
    ]
    rest = {key: results[key] for key in ("bits_per_byte", "tokens", "seconds")}
    return {**rest, "layers": layers}


def _show_scores(console: Console, scores: dict[str, dict[str, float]]) -> None:
    from rich.table import Table

    from collegium.assets import SHIPPED
    from collegium.models.checkpoint import open_checkpoint
    from collegium.models.summary import summarize

    sizes = [summarize(open_checkpoint(folder)) for folder in SHIPPED.values()]
    title = "bits per byte of held-out text from this machine (lower is better)"
    heads = [
        f"{name}\n{size.active_parameters or 0:,} of {size.parameters:,} parameters active"
        for name, size in zip(scores, sizes, strict=True)
    ]
    table = Table("domain", *heads, "MoE saves", title=title)
    for domain in scores["moe"]:
        ours, theirs = scores["moe"][domain], scores["dense"][domain]
        table.add_row(domain, f"{ours:.3f}", f"{theirs:.3f}", f"{1 - ours / theirs:+.1%}", end_section=domain == "all")
    console.print(table)


def _show_load(console: Console, loads: list[Load]) -> None:
    from rich.table import Table

    shades = " ▁▂▃▄▅▆▇█"
    table = Table("layer", "load of each expert", "busiest / mean", "entropy", "dead", title="load per layer")
    for at in loads:
        E = len(at.share)
        bars = "".join(shades[min(8, round(4 * share * E))] for share in at.share)
        entropy = f"{at.entropy.value:.2f} of {math.log2(E):.2f} bits"
        table.add_row(str(at.layer), bars, f"{at.max_violation.value + 1:.2f}", entropy, str(len(at.dead)))
    console.print(table)


def _show_domains(console: Console, information: list[DomainInformation]) -> None:
    """For the layer that tells domains apart best: which experts serve which domain."""
    from rich.table import Table

    best = max(information, key=lambda found: found.bits.value)
    table = Table(
        "domain",
        "experts it uses most (share of its tokens' slots)",
        title=f"layer {best.layer}: which experts serve which domain",
        caption="  ".join(f"layer {i.layer}: {i.bits.value:.2f} bits, shuffled {i.control:.2f}" for i in information)
        + "\nI(domain; expert), and the same with the documents' labels shuffled",
    )
    for name, share in zip(best.domains, best.share, strict=True):
        top = share.argsort()[::-1][:4]
        if share.sum():
            table.add_row(name, "  ".join(f"{expert}: {share[expert]:.0%}" for expert in top))
    console.print(table)


def _show_files(console: Console, out: Path, tokens: int, seconds: float) -> None:
    console.print(f"look:      open {out}/report.html in a browser (its figures as files: {out}/figures)")
    console.print(f"{out}/trace holds {tokens:,} tokens of routing")
    read = f"from collegium import Trace; print(Trace.open('{out}/trace').scan().collect())"
    console.print(f'read it:   python -c "{read}"')
    console.print("your own:  collegium trace MODEL --data FOLDER --out TRACE")
    console.print(f"{seconds:.0f} s in all")
