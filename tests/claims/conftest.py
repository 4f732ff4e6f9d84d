"""What claim experiments share: small real runs on the local corpus, and the record of what came out.

An experiment trains the same small model with and without the method, over several seeds, and reports through the
`claim` fixture. The record (``src/collegium/claims.json``) feeds ``collegium methods`` and the docs. An effect that
does not show is recorded as "not reproduced" with its numbers and fails nothing; a claim that was recorded as holding
and does so no longer fails.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from claim_base import BASE, SEEDS
from transformers import AutoTokenizer

import collegium
from collegium import load
from collegium.data import document_batches, open_corpus
from collegium.files import atomic_file
from collegium.layer import moe_layers
from collegium.measure import domain_information
from collegium.measure import load as load_of
from collegium.trace import record
from collegium.train import Recipe, train

RECORD = Path(collegium.__file__).with_name("claims.json")


@dataclass(frozen=True)
class Outcome:
    """Held-out quality and routing of one small run; routing numbers are means over layers.

    Attributes:
        bits_per_byte: mean over domains.
        max_violation: MaxVio on held-out text.
        dead: experts without a token, summed over layers.
        information: I(domain; expert), bits.
        folder: of the run, with ``model`` and ``trace``.
        active: experts of a token that compute something, mean over tokens and layers.
    """

    bits_per_byte: float
    max_violation: float
    dead: int
    information: float
    folder: Path
    active: float


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The local corpus, 2 MB of each domain, as a file: collecting it anew takes longer than many a run."""
    file = tmp_path_factory.mktemp("corpus") / "local.jsonl"
    lines = (
        json.dumps({"text": document.text, "domain": document.domain}) + "\n"
        for document in open_corpus("local", max_bytes_per_domain=2_000_000).documents()
    )
    with file.open("w", encoding="utf-8") as opened:
        opened.writelines(lines)
    return file


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Callable[..., list[Outcome]]:
    """``experiment("moe.balance.load_balancing=0")``: outcomes of the base recipe so changed, one per seed."""
    done: dict[tuple[str, ...], list[Outcome]] = {}

    def run(*overrides: str) -> list[Outcome]:
        if overrides not in done:
            changed = (f"data.corpus={corpus}", *overrides)
            done[overrides] = [_run(tmp_path_factory.mktemp("run"), changed, seed) for seed in SEEDS]
        return done[overrides]

    return run


def _run(folder: Path, overrides: tuple[str, ...], seed: int) -> Outcome:
    base = copy.deepcopy(BASE)
    if any(one.startswith("moe.router=") for one in overrides):
        del base["moe"]["balance"]  # a system brings its own, and says so where it replaces another
    recipe = Recipe.parse(base, [*overrides, f"run.seed={seed}"])
    summary = train(recipe, folder)
    model = load(folder / "model")
    corpus = open_corpus(recipe.data.corpus)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    batches = document_batches(corpus, tokenizer, "valid", sequence_length=128, batch_size=64, max_tokens=100_000)
    trace = record(model, batches, folder / "trace", domains=corpus.domains)
    loads = load_of(trace)
    return Outcome(
        bits_per_byte=float(np.mean(list(summary["domains"].values()))),
        max_violation=float(np.mean([float(at.max_violation) for at in loads])),
        dead=sum(len(at.dead) for at in loads),
        information=float(np.mean([float(found.bits) for found in domain_information(trace)])),
        folder=folder,
        active=float(np.mean([at.counts[: _computing(model, at.layer)].sum() / len(trace) for at in loads])),
    )


def _computing(model: Any, layer: int) -> int:
    """Experts of a layer that compute something; their ids come first."""
    gate = next(one.gate for one in moe_layers(model) if one.layer_index == layer)
    return int(gate.num_true or gate.num_experts)


@pytest.fixture
def claim() -> Callable[[str, bool, str], None]:
    """``claim("balance/load_balancing", holds, numbers)`` records the outcome of an experiment."""

    def report(method: str, holds: bool, numbers: str) -> None:
        known = json.loads(RECORD.read_text(encoding="utf-8"))
        before = known.get(method, {}).get("status")
        known[method] = {"status": "holds" if holds else "not reproduced", "numbers": numbers}
        with atomic_file(RECORD) as partial:
            partial.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n", encoding="utf-8")
        assert holds or before != "holds", f"{method} held before and does not now: {numbers}"

    return report
