"""Claims of the metrics: what their papers found in large models, on the demo model and on a training run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from claim_base import BASE, SEEDS
from transformers import AutoTokenizer

from collegium import load as load_model
from collegium.assets import SHIPPED
from collegium.data import Corpus, document_batches, open_corpus
from collegium.measure import load
from collegium.measure.cache import cache_curves
from collegium.measure.congestion import congestion_series
from collegium.measure.predict import predictability
from collegium.measure.specialisation import domain_information
from collegium.measure.token_information import token_information
from collegium.trace import Trace, record
from collegium.train import Recipe, train

pytestmark = pytest.mark.claim

STEPS = (20, 40, 60, 100, 140, 200, 300, 400)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Trace]]:
    """The demo model, and its traces of three thirds of the documents it was not trained on."""
    model = load_model(SHIPPED["demo"])
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["demo"])
    corpus = open_corpus("local", max_bytes_per_domain=3_000_000)
    held_out = [document for split in ("valid", "test") for document in corpus.documents(split)]
    traces = []
    for seed in SEEDS:
        third = Corpus(f"third {seed}", [(document, None) for document in held_out[seed :: len(SEEDS)]])
        batches = document_batches(third, tokenizer, None, sequence_length=256, batch_size=8, max_tokens=30_000)
        folder = tmp_path_factory.mktemp("third") / "trace"
        traces.append(
            record(model, batches, folder, domains=third.domains, logits=True, gate_inputs=0.3, max_tokens=30_000)
        )
    return model, traces


def ranges(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def test_experts_specialise_by_domain(samples: tuple[Any, list[Trace]], claim: Callable) -> None:
    """Every layer of every sample tells more about the domain than any of 20 relabellings of the documents."""
    found = [layer for trace in samples[1] for layer in domain_information(trace)]
    claim(
        "metric/domains",
        all(at.bits.value > at.control_high for at in found),
        f"I(domain; expert) {ranges([at.bits.value for at in found])} bits over layers and samples, "
        f"highest of 20 shuffles {ranges([at.control_high for at in found])}; demo model, 3 samples",
    )


def test_text_is_cached_better_than_shuffled_tokens(samples: tuple[Any, list[Trace]], claim: Callable) -> None:
    """Not All Models Suit Expert Offloading (2025): a small cache serves text better than shuffled tokens.
    Its claim about the metric itself is with those of running from a disk, on more models."""
    curves = [layer for trace in samples[1] for layer in cache_curves(trace, ratios=(2,))]
    claim(
        "metric/cache",
        all(at.sch[0] >= at.lru[0] > at.lru_shuffled[0] for at in curves),
        f"hit rate at 2 K experts: SCH(16) {ranges([float(at.sch[0]) for at in curves])}, LRU "
        f"{ranges([float(at.lru[0]) for at in curves])}, LRU with tokens shuffled "
        f"{ranges([float(at.lru_shuffled[0]) for at in curves])}; demo model, 3 samples",
    )


def test_the_next_gate_is_best_guessed_by_itself(samples: tuple[Any, list[Trace]], claim: Callable) -> None:
    """Fate (2025): gate input > previous layer > frequency, in every layer that has all three."""
    model, traces = samples
    found = [at.recall for trace in traces for at in predictability(trace, model) if "gate input" in at.recall]
    order = ("gate input", "previous layer", "frequency")
    claim(
        "metric/predictability",
        all(r[order[0]].value > r[order[1]].value > r[order[2]].value for r in found),
        "recall@K: " + ", ".join(f"{name} {ranges([r[name].value for r in found])}" for name in (*order, "token id"))
        + "; demo model, layers 1 to 3, 3 samples",
    )  # fmt: skip


def test_experts_follow_token_ids_more_than_position(samples: tuple[Any, list[Trace]], claim: Callable) -> None:
    """OpenMoE (2024): specialisation is by token id, much more than by position or by the domain beyond the id."""
    found = [layer for trace in samples[1] for layer in token_information(trace)]
    beyond = [(at.token.value - at.token_control, at.position - at.position_control) for at in found]
    domain = [(at.domain_given_token or 0) - (at.domain_given_token_control or 0) for at in found]
    claim(
        "metric/tokens",
        all(token > 5 * position and token > d for (token, position), d in zip(beyond, domain, strict=True)),
        f"bits beyond the shuffled control: token id {ranges([t for t, _ in beyond])}, domain given the id "
        f"{ranges(domain)}, position {ranges([p for _, p in beyond])}; demo model, 3 samples",
    )


def test_balance_and_congestion_over_training(tmp_path: Path, corpus: Path, claim: Callable) -> None:
    """Three Phases (2026): the congestion coefficient surges early; load balance on the way is reported as seen."""
    balance, phases, told = [], [], []
    for seed in SEEDS:
        out = tmp_path / str(seed)
        keep = ("run.checkpoint_every=20", "run.keep_checkpoints=0")
        train(Recipe.parse(BASE, [f"data.corpus={corpus}", f"run.seed={seed}", *keep]), out)
        traces = [_trace(out, corpus, step) for step in STEPS]
        *layers, whole = congestion_series(traces, STEPS)
        told += [f"{np.isfinite(at.gamma).sum()} of {len(STEPS)}" for at in layers]
        phases.append(" -> ".join(whole.kinds) or "none, as gamma is told at too few checkpoints")
        balance.append([mean(float(at.max_violation) for at in load(trace)) for trace in traces])
    claim(
        "metric/congestion",
        all(phase.startswith("surge") for phase in phases),
        f"phases by seed: {'; '.join(phases)}; checkpoints with a bounded interval of gamma, by seed and layer: "
        f"{', '.join(told)}; 50,000 tokens each",
    )
    curve = [mean(values) for values in zip(*balance, strict=True)]
    claim(
        "metric/load",
        curve[-1] < curve[0],
        "MaxVio on held-out text, mean of 3 seeds, at step "
        + ", ".join(f"{step}: {value:.2f}" for step, value in zip(STEPS, curve, strict=True)),
    )


def _trace(out: Path, corpus: Path, step: int) -> Trace:
    folder = out / "checkpoints" / f"step-{step:08d}" / "model"
    documents = open_corpus(corpus)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    batches = document_batches(documents, tokenizer, "valid", sequence_length=128, batch_size=64, max_tokens=50_000)
    return record(load_model(folder), batches, out / f"trace-{step}", domains=documents.domains, logits=True)
