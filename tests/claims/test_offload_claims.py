"""Claims of running in little memory, on traces of the demo model and of models that are trained here."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from claim_base import BASE, SEEDS
from offload_subjects import Subject, TwoCopies
from scipy.stats import spearmanr
from transformers import AutoTokenizer

from collegium import export
from collegium import load as load_model
from collegium.assets import SHIPPED
from collegium.data import Corpus, document_batches, open_corpus
from collegium.measure.cache import cache_curves
from collegium.measure.locality import local_routing_consistency
from collegium.offload.cost import CostModel
from collegium.offload.gates import ModelGates
from collegium.offload.policies import find_policy
from collegium.offload.precision.base import PrecisionPolicy
from collegium.offload.precision.hobbit import Hobbit
from collegium.offload.predictors import find_predictor
from collegium.offload.predictors.recall import recall
from collegium.offload.simulate import SimulationSettings, simulate
from collegium.offload.simulate_passes import Passes
from collegium.trace import record
from collegium.train import Recipe, train

pytestmark = pytest.mark.claim

TOKENS = 20_000
SHORT = ("model.num_hidden_layers=4", "run.steps=200", "run.batch_size=16")
TRAINED = {
    "uneven": (*SHORT, "moe.balance.load_balancing=0"),
    "even": (*SHORT, "moe.num_experts=32", "moe.num_experts_per_tok=4"),
}
"""Beside the demo model (4 layers, top-2 of 16): one whose load nothing evens out, and one of top-4 of 32."""


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[Subject]:
    local = open_corpus("local", max_bytes_per_domain=3_000_000)
    found = [subject(tmp_path_factory.mktemp("demo"), "demo", SHIPPED["demo"], local)]
    for name, changes in TRAINED.items():
        out = tmp_path_factory.mktemp(name)
        train(Recipe.parse(BASE, [f"data.corpus={corpus}", *changes]), out)
        export(load_model(out / "model"), "qwen3_moe").save_pretrained(out / "plain")
        AutoTokenizer.from_pretrained(out / "model").save_pretrained(out / "plain")
        found.append(subject(out, name, out / "plain", open_corpus(corpus)))
    return found


def subject(out: Path, name: str, folder: Path, corpus: Any) -> Subject:
    """A model, and traces of three thirds of the documents it was not trained on."""
    model, tokenizer = load_model(folder).float().eval(), AutoTokenizer.from_pretrained(folder)
    held_out = [document for split in ("valid", "test") for document in corpus.documents(split)]
    traces, sequences = [], []
    for seed in SEEDS:
        third = Corpus(f"third {seed}", [(document, None) for document in held_out[seed :: len(SEEDS)]])
        batches = list(document_batches(third, tokenizer, None, sequence_length=256, batch_size=8, max_tokens=TOKENS))
        trace = record(
            model, batches, out / f"trace-{seed}", domains=third.domains, logits=True, gate_inputs=0.2,
            max_tokens=TOKENS,
        )  # fmt: skip
        traces.append(trace)
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            sequences += [ids[kept][None] for ids, kept in zip(batch["input_ids"], mask, strict=True)] * (seed == 0)
    return Subject(name, model, traces, sequences)


def ranges(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def test_recall_of_predictors(subjects: list[Subject], claim: Callable) -> None:
    """Fate (2025), EdgeMoE (2023): gate reuse > path > frequency in every layer but the first, held out by document."""
    names = ("gate_reuse:depth=3", "path", "token_id", "activation_matrix", "frequency")
    found: dict[str, dict[tuple[str, int, int, int], float]] = {name: {} for name in names}
    for one, seed in product(subjects, range(len(SEEDS))):
        for name in names:
            for at in recall(find_predictor(name), one.traces[seed], gates=ModelGates(one.model), max_tokens=6_000):
                found[name][one.name, seed, at.layer, at.distance] = at.value.value
    where = [key for key in found["path"] if key[2] > 0]  # one layer ahead; nothing comes before layer 0

    def told(name: str, keys: list[Any]) -> str:
        return f"{name.partition(':')[0]} {ranges([found[name][key] for key in keys])}"

    far = [ranges([found[names[0]][key] for key in found[names[0]] if key[2:] == (3, ahead)]) for ahead in (1, 2, 3)]
    for better, worse in ((names[0], "path"), ("path", "frequency")):
        won = {
            one.name: [found[better][key] > found[worse][key] for key in where if key[0] == one.name]
            for one in subjects
        }
        claim(
            f"predictor/{better.partition(':')[0]}",
            all(all(each) for each in won.values()),
            f"recall@K one layer ahead above that of {worse} in "
            + ", ".join(f"{sum(each)} of {len(each)} layers of {name}" for name, each in won.items()) + "; "
            + "; ".join(
                f"{one.name}: " + ", ".join(told(name, [key for key in where if key[0] == one.name]) for name in names)
                for one in subjects
            ) + "; layers 1 to 3, 3 samples each"
            + f"; the last layer by gate reuse 1, 2 and 3 layers ahead: {', '.join(far)}" * (better == names[0]),
        )  # fmt: skip


def test_routing_path_against_the_token_table(subjects: list[Subject], claim: Callable) -> None:
    """ExpertFlow (2024): an encoder that reads the context knows more than a table by token id; layers together."""
    values: dict[str, list[float]] = {"routing_path": [], "token_id": []}
    for name, one in product(values, subjects):
        found = recall(find_predictor(name), one.traces[0], max_tokens=3_000)
        values[name].append(mean(at.value.value for at in found if at.layer == at.distance - 1))
    claim(
        "predictor/routing_path",
        all(a > b for a, b in zip(*values.values(), strict=True)),
        "recall@K of all layers before the first has run, "
        + ", ".join(
            f"{one.name}: encoder {a:.2f}, table {b:.2f}" for one, a, b in zip(subjects, *values.values(), strict=True)
        )
        + f"; trained on half of {TOKENS} tokens",
    )


def test_srp_predicts_the_hit_rate(subjects: list[Subject], claim: Callable) -> None:
    """Not All Models Suit Expert Offloading (2025): SRP of text exceeds that of shuffled tokens, and layers of a higher
    SRP have a higher hit rate at 2 K experts."""
    srp, low, shuffled, lru, names = [], [], [], [], []
    for one in subjects:
        for trace in one.traces:
            layers = [at for at in local_routing_consistency(trace, (16,)) if at.layer is not None]
            srp += [at.srp[0].value for at in layers]
            low += [at.srp[0].low for at in layers]
            shuffled += [float(at.shuffled[0]) for at in layers]
            lru += [float(at.lru[0]) for at in cache_curves(trace, ratios=(2,))]
            names += [one.name] * len(layers)
    rank = float(spearmanr(srp, lru).statistic)
    within = []
    for one in subjects:
        own = [(x, y) for x, y, name in zip(srp, lru, names, strict=True) if name == one.name]
        within.append(f"{one.name} {float(spearmanr(own).statistic):.2f}")
    claim(
        "metric/locality",
        rank > 0.5 and all(text > chance for text, chance in zip(low, shuffled, strict=True)),
        f"SRP(16) {ranges(srp)}, tokens shuffled {ranges(shuffled)}; Spearman correlation of SRP(16) with the LRU hit "
        f"rate at 2 K experts ({ranges(lru)}) over layers, samples and {len(subjects)} models {rank:.2f}, within "
        + ", ".join(within),
    )


@torch.no_grad()
def test_hobbit(subjects: list[Subject], claim: Callable) -> None:
    """HOBBIT (2024): less to read for at most 1 % of perplexity; and nothing changes at neutral thresholds."""
    told, holds = [], []
    for one in subjects:
        copies, text = TwoCopies(one, ratio=2), one.sequences[:40]
        tokens = sum(ids.numel() for ids in text)
        with copies.running(None):
            plain = [one.model(ids).logits for ids in text]
        neutral = Hobbit(1.0, 1.0).build(one.geometry, (8, 4))
        base, read = judged(copies, neutral, text, plain)
        settings = {
            "T 0.6, 0.9": Hobbit(0.6, 0.9),
            "shares 67 %, 30 %": Hobbit.of_trace(one.traces[1]),
            "shares, deterministic": Hobbit.of_trace(one.traces[1], deterministic=True),
        }
        for name, setting in settings.items():
            loss, less = judged(copies, setting.build(one.geometry, (8, 4)), text)
            if not setting.deterministic:  # which is ours, for outputs that do not depend on memory
                holds.append(less < read and np.exp(loss - base) <= 1.01)
            told.append(
                f"{one.name}, {name} (T {setting.t1:.2f}, {setting.t2:.2f}): {less / tokens / 1e3:.3g} of "
                f"{read / tokens / 1e3:.3g} kB a token, perplexity {100 * (np.exp(loss - base) - 1):+.2f} %"
            )
    claim("precision/hobbit", all(holds), "; ".join(told) + "; 8 and 4 bits, memory of 2 K experts a layer")


def judged(
    copies: TwoCopies, policy: PrecisionPolicy, text: list[torch.Tensor], same: list[torch.Tensor] | None = None
) -> tuple[float, float]:
    """``(nats a token, bytes read)`` of a policy; its logits must be `same`, bit for bit, where that is given."""
    nats, count = 0.0, 0
    with copies.running(policy) as pools:
        for n, ids in enumerate(text):
            logits = copies.model(ids).logits
            assert same is None or torch.equal(logits, same[n])
            nats += float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return nats / count, float(sum(pool.reads * copies.nbytes[bits] for bits, pool in pools.items()))


def test_layer_aware_policies_against_one_global_lru(subjects: list[Subject], claim: Callable) -> None:
    """A share of the slots for each layer, or a score that knows the layers' order, beats LRU over one pool."""
    cost = CostModel(read_bandwidth=1e9, read_latency=1e-4, memory_bandwidth=1e10, measured="set; hit rates need none")
    names = ("lru:scope=global", "lru", "lfu", "edgemoe", "hobbit", "hybrimoe")
    rates: dict[str, list[float]] = {name: [] for name in names}
    for one, seed, ratio in product(subjects, range(len(SEEDS)), (1.5, 2)):
        passes = Passes(one.traces[seed], "tokens", 4_000, probabilities=True)
        capacity = int(ratio * sum(one.geometry.top_k))
        for name in names:
            found = simulate(passes, SimulationSettings(find_policy(name), capacity, {16: 1 << 20}), cost).found.sum(0)
            rates[name].append(float(found[0] / found.sum()))
    worse = rates[names[0]]
    for name in names[1:]:
        won = sum(a > b for a, b in zip(rates[name], worse, strict=True))
        claim(
            f"cache/{name}",
            won == len(worse),
            f"hit rate above that of LRU over one pool in {won} of {len(worse)} runs (3 models, 3 samples, 1.5 K and "
            f"2 K slots a layer): {ranges(rates[name])}, mean {mean(rates[name]):.2f}, against {ranges(worse)}, mean "
            f"{mean(worse):.2f}",
        )
