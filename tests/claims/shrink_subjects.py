"""What the claims about shrinking share: the models that are shrunk, their calibration, and their loss by domain."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers import AutoTokenizer

import collegium
from collegium import load
from collegium.compress import apply_mask, apply_plan, calibrate
from collegium.compress.plan import Plan
from collegium.compress.target import Target
from collegium.data import Corpus, document_batches
from collegium.measure.statistics import Statistics
from collegium.models.checkpoint import open_checkpoint

__all__ = ["Losses", "Results", "Subject", "average", "spread"]

LENGTH, BATCH = 128, 32
CALIBRATION, HELD_OUT = 12_000, 40_000

Losses = dict[str, float]
"""Domain -> nats a token."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is shrunk.

    Attributes:
        name: in the tables.
        folder: of the model.
        corpus: calibration documents are from its valid split, held-out ones from its test split.
    """

    name: str
    folder: Path
    corpus: Corpus

    @cached_property
    def model(self) -> Any:
        return load(self.folder).eval()

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def target(self) -> Target:
        return Target.of(open_checkpoint(self.folder))

    @cached_property
    def held_out(self) -> list[dict[str, torch.Tensor]]:
        found = document_batches(
            self.corpus, self.tokenizer, "test", sequence_length=LENGTH, batch_size=BATCH, max_tokens=HELD_OUT
        )
        return list(found)

    def statistics(self, out: Path, seed: int, seeds: int, collectors: Sequence[Any]) -> Statistics:
        """From one of `seeds` parts of the calibration documents."""
        documents = list(self.corpus.documents("valid"))[seed::seeds]
        part = Corpus(f"part {seed}", [(document, None) for document in documents])
        batches = document_batches(
            part, self.tokenizer, None, sequence_length=LENGTH, batch_size=BATCH, max_tokens=CALIBRATION
        )
        return calibrate(self.folder, batches, collectors, out, data=part.name, domains=part.domains)

    def masked(self, plan: Plan) -> Losses:
        """The losses with the plan as a mask, which is what the pruned checkpoint has."""
        with apply_mask(self.model, plan):
            return self.losses(self.model)

    def applied(self, plan: Plan, out: Path, statistics: Statistics | None = None) -> Losses:
        """The losses of the checkpoint that the plan makes."""
        return self.losses(load(apply_plan(plan, self.folder, out, statistics=statistics)).eval())

    @torch.no_grad()
    def losses(self, model: Any) -> Losses:
        """Nats a token on held-out documents, by domain."""
        nats: dict[int, float] = {}
        tokens: dict[int, int] = {}
        for batch in self.held_out:
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            seen = mask[:, 1:].bool()
            for row, domain in enumerate(batch["domain"].tolist()):
                nats[domain] = nats.get(domain, 0.0) + float(loss[row][seen[row]].sum())
                tokens[domain] = tokens.get(domain, 0) + int(seen[row].sum())
        return {self.corpus.domains[domain]: nats[domain] / tokens[domain] for domain in sorted(nats)}


def average(losses: Mapping[str, float], domains: Iterable[str] | None = None) -> float:
    """Mean over domains."""
    return mean(losses[name] for name in (losses if domains is None else domains))


class Results:
    """Rows of the table, and the page they become."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str, str]] = []
        self.found: dict[tuple[str, str, str], list[float]] = {}
        self.notes: list[str] = []

    def add(self, model: str, what: str, keep: str, values: Sequence[float], outside: Sequence[float] = ()) -> None:
        """One row: losses by seed, of the domains planned for and of the others."""
        self.found[model, what, keep] = list(values)
        self.rows.append((model, what, keep, spread(values), spread(outside)))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def __getitem__(self, key: tuple[str, str, str]) -> float:
        """Mean over seeds."""
        return mean(self.found[key])

    def complete(self) -> bool:
        """Whether every kind of row is there."""
        kinds = ("prune", "merge", "neurons", "factor", "recovered", "planned for the domain")
        return all(any(kind in row[1] for row in self.rows) for kind in kinds)

    def page(self) -> str:
        parts = [HEAD, *(f"- {note}" for note in self.notes)]
        parts += ["", *against_the_papers()]
        for model in dict.fromkeys(row[0] for row in self.rows):
            parts += ["", f"## {model}", "", "| method | kept | loss | other domains |", "|---|---|---|---|"]
            parts += [f"| {' | '.join(row[1:])} |" for row in self.rows if row[0] == model]
        return "\n".join(parts) + "\n"


KINDS = (
    "importance", "grouping", "merge", "router_edit", "neurons", "factor", "compaction", "recovery", "retrieval",
    "metric/super-experts",
)  # fmt: skip


def against_the_papers() -> list[str]:
    """What came of each paper's claim, from the record."""
    record = json.loads(Path(collegium.__file__).with_name("claims.json").read_text(encoding="utf-8"))
    found = {name: one for name, one in record.items() if name.startswith(KINDS)}
    head = ["## Against the papers", "", "| claim | here | numbers |", "|---|---|---|"]
    return head + [f"| `{name}` | {one['status']} | {one['numbers']} |" for name, one in sorted(found.items())]


HEAD = """# Shrinking: what was measured

Written by `make claims`. Nats a token on held-out documents, mean over domains, then mean and standard deviation over
three parts of the calibration documents (12,000 tokens each). No text is in both. Nothing was trained after shrinking
unless a row says so. "Kept" is the share of the experts, of their neurons, or of their parameters. For plans that were
made for one domain the loss is that domain's, mean over four domains, and the last column is the loss on all others.

*demo* is the shipped model (16 experts, 2 a token, trained with a balance loss); *uneven* is a model of two layers that
was trained for 1.6 M tokens without any.
"""


def spread(values: Sequence[float]) -> str:
    """``3.142 ± 0.010``."""
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
