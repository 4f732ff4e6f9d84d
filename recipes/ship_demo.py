"""Turn the two runs of ``recipes/demo.yaml`` into the models inside the package, with a card of measured numbers.

    collegium train recipes/demo.yaml --out runs/demo
    collegium train recipes/demo.yaml --dense-twin --out runs/demo-dense
    python recipes/ship_demo.py runs/demo runs/demo-dense

The MoE model is exported to a plain Qwen3-MoE, so that anything loads it. Every number of the card is measured here, on
the weights as they are shipped, over the test split, which training never looked at.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
from pathlib import Path
from string import Template
from typing import Any

import polars as pl
import torch
import transformers
from transformers import AutoTokenizer

from collegium import export, load
from collegium.assets import SHIPPED
from collegium.data import Corpus, document_batches, open_corpus, pack, token_bytes
from collegium.measure import DomainInformation, Load, domain_information
from collegium.measure import load as load_of
from collegium.trace import record
from collegium.train import Evaluation, Recipe, count_parameters, evaluate, read_metrics

TRACE_TOKENS = 262_144
LIMIT = 16_000_000


def main() -> None:
    """Export, measure, write the card."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("moe", type=Path, help="run folder of the MoE model")
    arguments.add_argument("dense", type=Path, help="run folder of its dense twin")
    runs = arguments.parse_args()
    ship(runs.moe / "model", SHIPPED["demo"], family="qwen3_moe")
    ship(runs.dense / "model", SHIPPED["demo-dense"], family=None)
    size = sum(file.stat().st_size for folder in SHIPPED.values() for file in folder.glob("*.safetensors"))
    if size > LIMIT:
        raise SystemExit(f"the weights are {size:,} bytes, more than {LIMIT:,}")

    folders = [runs.moe, runs.dense]
    recipe = Recipe.load(runs.moe / "recipe.yaml")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["demo"])
    corpus = open_corpus(recipe.data.corpus, **recipe.data.options)
    models = {name: load(folder, dtype=torch.float32) for name, folder in SHIPPED.items()}
    with tempfile.TemporaryDirectory() as scratch:
        packed = pack(corpus, tokenizer, "test", recipe.data.sequence_length, scratch, by_domain=True)
        sizes = token_bytes(tokenizer)
        scores = {name: evaluate(model, packed, sizes, batch_size=32) for name, model in models.items()}
        rows = document_batches(corpus, tokenizer, "test", sequence_length=256, batch_size=16, max_tokens=TRACE_TOKENS)
        trace = record(models["demo"], rows, Path(scratch) / "trace", domains=corpus.domains)
        loads, information = load_of(trace), domain_information(trace)
    numbers = {
        "experts": loads[0].share.size,
        "top_k": trace.meta.layers[0].top_k,
        "megabytes": f"{size / 1e6:.1f}",
        "trained": "\n".join(trained(name, run) for name, run in zip(SHIPPED, folders, strict=True)),
        "machine": platform.machine(),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "traced": f"{len(trace):,}",
        "layers": "\n".join(routing(*pair) for pair in zip(loads, information, strict=True)),
        **corpus_facts(corpus),
        **quality(scores["demo"], scores["demo-dense"]),
    }
    template = Template(Path(__file__).with_name("demo_card.md").read_text(encoding="utf-8"))
    (SHIPPED["demo"] / "README.md").write_text(template.substitute(numbers), encoding="utf-8")


def ship(source: Path, target: Path, family: str | None) -> None:
    """Write one plain transformers folder in bfloat16, with the tokenizer."""
    model = load(source)
    plain = model if family is None else export(model, family)
    shutil.rmtree(target, ignore_errors=True)
    plain.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def trained(name: str, run: Path) -> str:
    """A row of the table of runs. The median rate is that of an undisturbed machine; the minutes are those it took."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    rates = read_metrics(run / "metrics.jsonl").filter(pl.col("event") == "step")["tokens_per_second"]
    size = count_parameters(load(run / "model"))
    rate, tokens = float(rates.median()), summary["tokens"]
    return (
        f"| {name} | {size.total:,} | {size.active:,} | {tokens:,} | {rate:,.0f} | {tokens / rate / 60:.0f} | "
        f"{summary['seconds'] / 60:.0f} |"
    )


def corpus_facts(corpus: Corpus) -> dict[str, str]:
    """The corpus in one line."""
    sizes = ((domain, corpus.size("train", domain)[1]) for domain in corpus.domains)
    return {"fingerprint": corpus.fingerprint(), "corpus": ", ".join(f"{domain} {size:,}" for domain, size in sizes)}


def quality(moe: Evaluation, dense: Evaluation) -> dict[str, Any]:
    """Held-out bits per byte of both, by domain and over all."""
    ours, theirs = moe.bits_per_byte, dense.bits_per_byte
    mean_moe, mean_dense = (sum(found.values()) / len(found) for found in (ours, theirs))
    rows = [
        f"| {domain} | {moe.bytes[domain]:,} | {bits:.3f} | {theirs[domain]:.3f} | {1 - bits / theirs[domain]:+.1%} |"
        for domain, bits in ours.items()
    ]
    return {
        "mean_moe": f"{mean_moe:.3f}",
        "mean_dense": f"{mean_dense:.3f}",
        "mean_saved": f"{1 - mean_moe / mean_dense:+.1%}",
        "all_moe": f"{moe.overall:.3f}",
        "all_dense": f"{dense.overall:.3f}",
        "all_saved": f"{1 - moe.overall / dense.overall:+.1%}",
        "better": sum(bits < theirs[domain] for domain, bits in ours.items()),
        "domains": len(ours),
        "scores": "\n".join(rows),
    }


def routing(at: Load, found: DomainInformation) -> str:
    """A row of the table of layers."""
    return (
        f"| {at.layer} | {at.max_violation + 1:.2f} | {at.entropy:.2f} | {len(at.dead)} | {found.bits:.3f} | "
        f"{found.control:.3f} | {found.control_high:.3f} |"
    )


if __name__ == "__main__":
    main()
