"""Claims of the shrinking methods, on the demo model and on one that was trained without balancing.

Losses are nats a token on held-out documents, means over domains; plans are made from other documents, three parts of
them (the seeds). Every number goes into docs/results/shrink.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from claim_base import BASE, SEEDS
from shrink_subjects import Losses, Results, Subject, average, spread
from transformers import AutoTokenizer

from collegium import export, load
from collegium.assets import SHIPPED
from collegium.compress import COLLECTORS, Plan, Uniform, apply_plan, make_plan
from collegium.compress.compressed_experts import install_compressed, tune_compressed
from collegium.compress.factor import factor_plan
from collegium.compress.grouping import find_grouping
from collegium.compress.importance.advice import advise
from collegium.compress.neurons import plan_neurons
from collegium.compress.own import load_own
from collegium.compress.own_write import save_own
from collegium.compress.plan import Operator, RouterEdit
from collegium.compress.profiles import Profiles, retrieval
from collegium.compress.recover import recover
from collegium.data import document_batches, open_corpus
from collegium.measure.statistics import Statistics
from collegium.measure.super_experts import super_experts
from collegium.sites import sites
from collegium.train import Recipe, train

pytestmark = pytest.mark.claim

KEEPS = {"75 %": 0.75, "50 %": 0.5}
SCORES = (
    "random", "router_probability", "frequency", "weighted_frequency", "dern", "tcess", "gradient_utility",
    "ranked_choice", "leave_one_out", "man", "msan", "max_activations", "reap", "ean_sum", "weighted_ean_sum",
    "easy_ep",
)  # fmt: skip
"""`z_code` and `mc_smoe` order experts as `frequency` does."""
FOR_DOMAINS = ("easy_ep", "tcess")
"""Scores that are meant for the domain a model is to serve."""
DOMAINS = 4
"""The largest, which domain plans are made for."""
STEPS = 300
"""Of tuning with compressed experts."""
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "shrink.md"


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    """Collects the rows of all tests, and writes them at the end if every part ran."""
    found = Results()
    yield found
    if found.complete():
        RESULTS.write_text(found.page(), encoding="utf-8")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Subject]:
    """The demo model, and a small one whose load nothing evens out."""
    uneven = trained(tmp_path_factory.mktemp("uneven"), f"data.corpus={corpus}", "moe.balance.load_balancing=0")
    documents = open_corpus(corpus)
    folders = {"demo": SHIPPED["demo"], "uneven": uneven}
    return {name: Subject(name, folder, documents) for name, folder in folders.items()}


def trained(out: Path, *changes: str) -> Path:
    """Folder of the base model so changed, trained, as plain transformers has it."""
    train(Recipe.parse(BASE, list(changes)), out)
    export(load(out / "model"), "qwen3_moe").save_pretrained(out / "plain")
    AutoTokenizer.from_pretrained(out / "model").save_pretrained(out / "plain")
    return out / "plain"


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory, subjects: dict[str, Subject]) -> dict[str, list[Statistics]]:
    """Of each subject, from each part of the calibration documents: everything there is to gather."""
    folder = tmp_path_factory.mktemp("statistics")
    return {
        name: [
            subject.statistics(folder / f"{name}-{seed}", seed, len(SEEDS), [one() for one in COLLECTORS])
            for seed in SEEDS
        ]
        for name, subject in subjects.items()
    }


def losses(
    subject: Subject, found: list[Statistics], keep: float, importance: str = "reap", **settings: Any
) -> list[Losses]:
    """With a plan from each of the statistics as a mask. Chance gets another draw with each of them."""
    drawn = [{"settings": {"seed": seed}} if importance == "random" else {} for seed in SEEDS]
    if importance == "max_activations":  # a maximum is not kept by domain
        settings = {"combine": "pooled", **settings}
    return [
        subject.masked(make_plan(one, subject.target, Uniform(keep), importance=importance, **settings, **draw))
        for one, draw in zip(found, drawn, strict=True)
    ]


@pytest.mark.parametrize("name", ["demo", "uneven"])
def test_scores(
    name: str,
    subjects: dict[str, Subject],
    statistics: dict[str, list[Statistics]],
    results: Results,
    claim: Callable,
) -> None:
    """Output-aware scores against frequency against chance, at a quarter and at half of the experts."""
    subject = subjects[name]
    results.add(name, "full model", "100 %", [average(subject.losses(subject.model))])
    for share, keep in KEEPS.items():
        for score in SCORES:
            found = losses(subject, statistics[name], keep, score)
            results.add(name, f"prune by {score}", share, [average(one) for one in found])
    advice = advise(statistics[name][0])
    results.note(f"{name}: {advice.text}.")
    if name == "demo":
        return  # what is claimed needs both models
    for score in SCORES:
        if score not in ("random", *FOR_DOMAINS):
            _claim_score(score, results, claim)
    better = {
        model: min(
            ("reap", "man", "weighted_ean_sum", "easy_ep"), key=lambda s: results[model, f"prune by {s}", "50 %"]
        )
        for model in subjects
    }
    for model, best in better.items():
        kind = "sums" if best in ("weighted_ean_sum", "easy_ep") else "means"
        told = advise(statistics[model][0]).prefer
        results.note(
            f"Of REAP, MAN, the weighted norm sum and EASY-EP, {best} is best on {model} at 50 %: {kind}; the rule of "
            f"thumb of `collegium plan` said {told} beforehand."
        )


def _claim_score(score: str, results: Results, claim: Callable) -> None:
    """A score beats chance, and one that looks at outputs beats frequency too, in every case."""
    rivals = ["random"]
    if score in ("man", "msan", "max_activations", "reap", "ean_sum", "weighted_ean_sum", "leave_one_out"):
        rivals.append("frequency")
    cases = [(model, share) for model in ("demo", "uneven") for share in KEEPS]
    won = all(
        results[model, f"prune by {score}", share] < results[model, f"prune by {rival}", share]
        for model, share in cases
        for rival in rivals
    )
    numbers = "; ".join(
        f"{model} {share} kept: {results[model, f'prune by {score}', share]:.3f}, "
        + ", ".join(f"{rival} {results[model, f'prune by {rival}', share]:.3f}" for rival in rivals)
        for model, share in cases
    )
    claim(f"importance/{score}", won, f"nats a token: {numbers}; 3 parts of the calibration text")


@pytest.mark.parametrize("score", FOR_DOMAINS)
def test_plans_for_a_domain(
    score: str, subjects: dict[str, Subject], statistics: dict[str, list[Statistics]], results: Results, claim: Callable
) -> None:
    """A plan for a domain is better there than the general one and worse elsewhere (EASY-EP, PreMoe; 2025)."""
    subject, found = subjects["demo"], statistics["demo"]
    everywhere = set.intersection(*(set(one.meta.domains) for one in found))
    size = {name: sum(int(one.get(one.layers[0], "n_tokens", name)) for one in found) for name in sorted(everywhere)}
    chosen = sorted(size, key=lambda name: -size[name])[:DOMAINS]
    general = losses(subject, found, 0.5, score)
    kinds: dict[str, tuple[list[float], list[float]]] = {"the domain": ([], []), "all domains": ([], [])}
    for i in range(len(SEEDS)):
        inside: dict[str, list[float]] = {kind: [] for kind in kinds}
        outside: dict[str, list[float]] = {kind: [] for kind in kinds}
        for name in chosen:
            plan = make_plan(found[i], subject.target, Uniform(0.5), importance=score, domains=(name,))
            for kind, at in (("the domain", subject.masked(plan)), ("all domains", general[i])):
                inside[kind].append(at[name])
                outside[kind].append(average(at, [domain for domain in at if domain != name]))
        for kind, (own, other) in kinds.items():
            own.append(mean(inside[kind]))
            other.append(mean(outside[kind]))
    for kind, (own, other) in kinds.items():
        results.add("demo", f"prune by {score}, planned for {kind}", "50 %", own, other)
    (own, other), (base_in, base_out) = kinds["the domain"], kinds["all domains"]
    claim(
        f"importance/{score}",
        mean(own) < mean(base_in) and mean(other) > mean(base_out),
        f"half of the experts kept, {DOMAINS} domains: in the domain {spread(own)} against {spread(base_in)} of the "
        f"general plan, elsewhere {spread(other)} against {spread(base_out)}; the general plan is at "
        f"{results['demo', f'prune by {score}', '50 %']:.3f} over all domains, frequency at "
        f"{results['demo', 'prune by frequency', '50 %']:.3f}",
    )


def test_super_experts(
    subjects: dict[str, Subject], statistics: dict[str, list[Statistics]], results: Results, claim: Callable
) -> None:
    """Removing super experts hurts far more than removing as many at random (Unveiling Super Experts, 2025)."""
    subject = subjects["demo"]
    found = super_experts(statistics["demo"][0]).found
    if not found:
        claim(
            "metric/super-experts",
            False,
            f"the demo model has none: largest absolute output {super_experts(statistics['demo'][0]).largest:.1f}, "
            f"threshold {super_experts(statistics['demo'][0]).threshold:.1f}; a planted one is found in the tests",
        )
        return
    gone = {one.layer: {x.expert for x in found if x.layer == one.layer} for one in found}
    full = average(subject.losses(subject.model))
    hurt = average(subject.masked(_without(subject, statistics["demo"][0], gone))) - full
    chance = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            layer: set(torch.randperm(16, generator=generator)[: len(experts)].tolist())
            for layer, experts in gone.items()
        }
        chance.append(average(subject.masked(_without(subject, statistics["demo"][0], drawn))) - full)
    claim(
        "metric/super-experts",
        hurt > 3 * max(chance),
        f"without {len(found)} super experts the loss rises by {hurt:.3f} nats, without as many random ones of the "
        f"same layers by {mean(chance):.3f} (at most {max(chance):.3f} of 10 draws)",
    )


def _without(subject: Subject, found: Statistics, gone: Mapping[int, set[int]]) -> Plan:
    """The plan that keeps everything else."""
    plan = make_plan(found, subject.target, Uniform(1.0))
    layers = tuple(
        replace_layer(one, tuple(e for e in one.keep if e not in gone.get(one.layer, set()))) for one in plan.layers
    )
    return Plan.model_validate({**dict(plan), "layers": layers})


def replace_layer(layer: Any, keep: tuple[int, ...]) -> Any:
    op = "identity" if len(keep) == layer.num_experts else "prune"
    return type(layer).model_validate({**dict(layer), "keep": keep, "op": op, "protected": ()})


MERGES: dict[str, tuple[str, str, dict[str, Any], str | None, dict[str, Any], str]] = {
    "average, not aligned": ("frequency", "average", {}, "mc_smoe", {}, "rows"),
    "MC-SMoE": ("frequency", "mc_smoe", {}, "mc_smoe", {}, "rows"),
    "MC-SMoE, random groups": ("frequency", "mc_smoe", {}, "random", {}, "rows"),
    "MC-SMoE, equal shares": ("frequency", "mc_smoe", {}, "mc_smoe", {"shares": "equal"}, "rows"),
    "MC-SMoE, rows freq_avg": ("frequency", "mc_smoe", {}, "mc_smoe", {}, "freq_avg"),
    "MC-SMoE, rows lse_fit": ("frequency", "mc_smoe", {}, "mc_smoe", {}, "lse_fit"),
    "MC-SMoE, many to one": ("frequency", "mc_smoe", {}, "mc_smoe", {}, "many_to_one"),
    "Sub-MoE": ("frequency", "sub_moe", {"align": False}, "sub_moe", {}, "rows"),
    "Sub-MoE, aligned": ("frequency", "sub_moe", {"align": True}, "sub_moe", {}, "rows"),
    "Sub-MoE, rank 0.75": ("frequency", "sub_moe", {"rank": 0.75}, "sub_moe", {}, "rows"),
    "Sub-MoE, rank 0.75, whitened": ("frequency", "sub_moe", {"rank": 0.75, "whiten": True}, "sub_moe", {}, "rows"),
    "DERN": ("dern", "dern", {}, None, {}, "dern"),
    "DERN, rows kept": ("dern", "dern", {}, None, {}, "rows"),
    "REAM": ("reap", "mc_smoe", {}, "ream", {}, "rows"),
    "partial preservation": ("weighted_ean_sum", "mc_smoe", {}, "partial_preservation", {}, "rows"),
}
"""Name -> importance, merge and its settings, grouping and its settings, router edit."""


@pytest.mark.parametrize("name", ["demo", "uneven"])
def test_merging(
    name: str,
    subjects: dict[str, Subject],
    statistics: dict[str, list[Statistics]],
    results: Results,
    claim: Callable,
    tmp_path: Path,
) -> None:
    """Merging against pruning at equal size, without recovery."""
    subject = subjects[name]
    for share, keep in KEEPS.items():
        for what, (score, merge, settings, grouping, of_grouping, rows) in MERGES.items():
            found = []
            for seed, one in enumerate(statistics[name]):
                plan = make_plan(
                    one,
                    subject.target,
                    Uniform(keep),
                    importance=score,
                    grouping=None if grouping is None else find_grouping(grouping, of_grouping),
                    operator=Operator(name=merge, settings=settings),
                    router=RouterEdit(mode=rows),
                )
                out = tmp_path / f"{what}-{share}-{seed}"
                if plan.portable:
                    found.append(average(subject.applied(plan, out, one)))
                else:
                    found.append(average(subject.losses(load_own(save_own(plan, subject.folder, out, statistics=one)))))
            results.add(name, f"merge: {what}", share, found)
    if name == "uneven":
        _claim_merges(results, claim)


def _claim_merges(results: Results, claim: Callable) -> None:
    cases = [(model, share) for model in ("demo", "uneven") for share in KEEPS]

    def compare(key: str, ours: str, rival: str) -> None:
        pairs = [(results[model, ours, share], results[model, rival, share]) for model, share in cases]
        numbers = "; ".join(
            f"{model} {share} kept: {a:.3f} against {b:.3f}"
            for (model, share), (a, b) in zip(cases, pairs, strict=True)
        )
        claim(key, all(a < b for a, b in pairs), f"{ours} against {rival}, nats a token: {numbers}")

    compare("merge/mc_smoe", "merge: MC-SMoE", "merge: average, not aligned")
    compare("grouping/mc_smoe", "merge: MC-SMoE", "merge: MC-SMoE, random groups")
    compare("merge/sub_moe", "merge: Sub-MoE", "prune by frequency")
    compare("grouping/sub_moe", "merge: Sub-MoE, aligned", "merge: MC-SMoE, random groups")
    compare("merge/dern", "merge: DERN", "prune by dern")
    compare("grouping/ream", "merge: REAM", "prune by reap")
    compare("grouping/partial_preservation", "merge: partial preservation", "prune by weighted_ean_sum")
    compare("router_edit/lse_fit", "merge: MC-SMoE, rows lse_fit", "merge: MC-SMoE")
    compare("router_edit/freq_avg", "merge: MC-SMoE, rows freq_avg", "merge: MC-SMoE")
    compare("router_edit/dern", "merge: DERN", "merge: DERN, rows kept")


def test_neurons(
    subjects: dict[str, Subject],
    statistics: dict[str, list[Statistics]],
    results: Results,
    claim: Callable,
    tmp_path: Path,
) -> None:
    """HEAPr (2025): a fifth of the neurons goes at nearly no loss, and better than as many parameters in experts."""
    subject = subjects["demo"]
    full = average(subject.losses(subject.model))
    for share in (13 / 16, 0.75, 0.5):
        label = f"{share:.0%}".replace("%", " %")
        for score in ("heapr", "minitron", "random"):
            for mode in ("uniform", "ragged"):
                found = []
                for seed, one in enumerate(statistics["demo"]):
                    plan = plan_neurons(
                        one,
                        subject.target,
                        score=score,
                        share=share,
                        mode=mode,
                        settings={"seed": seed} if score == "random" else {},
                    )
                    out = tmp_path / f"{score}-{mode}-{label}-{seed}"
                    if plan.portable:
                        found.append(average(subject.applied(plan, out, one)))
                    else:
                        model = load_own(save_own(plan, subject.folder, out, statistics=one))
                        found.append(average(subject.losses(model)))
                results.add("demo", f"neurons by {score}, {mode}", label, found)
    for score in ("reap", "weighted_ean_sum"):
        found_ = [average(one) for one in losses(subject, statistics["demo"], 13 / 16, score)]
        results.add("demo", f"prune by {score}", "81 %", found_)
    ours = results["demo", "neurons by heapr, ragged", "81 %"]
    experts = min(results["demo", f"prune by {score}", "81 %"] for score in ("reap", "weighted_ean_sum"))
    claim(
        "neurons/heapr",
        ours < experts and ours < 1.02 * full,
        f"81 % of the experts' neurons kept: {ours:.3f} nats a token (full model {full:.3f}), 13 of 16 whole experts "
        f"{experts:.3f}; at 50 %: ragged {results['demo', 'neurons by heapr, ragged', '50 %']:.3f}, uniform "
        f"{results['demo', 'neurons by heapr, uniform', '50 %']:.3f}, by activations "
        f"{results['demo', 'neurons by minitron, ragged', '50 %']:.3f}, chance "
        f"{results['demo', 'neurons by random, ragged', '50 %']:.3f}; demo model, 3 parts of the calibration text",
    )


def test_factors(
    subjects: dict[str, Subject],
    statistics: dict[str, list[Statistics]],
    results: Results,
    claim: Callable,
    tmp_path: Path,
) -> None:
    """Whitened truncation beats the plain one at equal rank (Sub-MoE, 2025)."""
    subject = subjects["demo"]
    for name in ("svd", "whitened_svd", "mc_smoe"):
        found = []
        for seed, one in enumerate(statistics["demo"]):
            plan = factor_plan(subject.folder, name, {"share": 0.5}, statistics=one)
            model = load_own(save_own(plan, subject.folder, tmp_path / f"{name}-{seed}", statistics=one))
            found.append(average(subject.losses(model)))
            if name != "whitened_svd":
                break  # the same whatever the text
        results.add("demo", f"factor: {name}", "50 %", found)
    plain, whitened = (results["demo", f"factor: {name}", "50 %"] for name in ("svd", "whitened_svd"))
    claim(
        "factor/whitened_svd",
        whitened < plain,
        f"half of the experts' parameters: {whitened:.3f} nats a token, plain truncation {plain:.3f}; demo model",
    )


def test_retrieval(subjects: dict[str, Subject], statistics: dict[str, list[Statistics]], claim: Callable) -> None:
    """PreMoe (2025): 64 tokens are enough to find the task, and its experts."""
    subject, accuracy = subjects["demo"], []
    for one in statistics["demo"]:
        profiles = Profiles.from_statistics(one, subject.target)
        accuracy.append(
            retrieval(profiles, subject.model, subject.tokenizer, subject.corpus, split="test", prompts=20).accuracy
        )
    chance = 1 / len(subject.corpus.domains)
    claim(
        "retrieval/premoe",
        min(accuracy) > 0.9,
        f"share of held-out prompts of 64 tokens whose domain is found: {spread(accuracy)} of "
        f"{len(subject.corpus.domains)} domains (chance {chance:.2f}); demo model, layer 0",
    )


def test_recovery(
    subjects: dict[str, Subject],
    statistics: dict[str, list[Statistics]],
    results: Results,
    claim: Callable,
    tmp_path: Path,
) -> None:
    """LM loss and KL beat KL alone in recovery (SlimQwen, 2026), from half of the experts by REAP."""
    subject = subjects["demo"]
    kinds: dict[str, dict[str, Any]] = {
        "LM + KL": {"kd_shares": (1.0, 0.75)},
        "KL": {"kd_shares": (1.0, 1.0)},
        "LM": {"kd_shares": (0.0, 0.0)},
        "router only, LM + KL": {"kd_shares": (1.0, 0.75), "only": "router"},
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    before: list[float] = []
    for seed, one in zip(SEEDS, statistics["demo"], strict=True):
        plan = make_plan(one, subject.target, Uniform(0.5))
        student = apply_plan(plan, subject.folder, tmp_path / f"student-{seed}")
        before.append(average(subject.losses(load(student).eval())))
        for kind, settings in kinds.items():
            out = tmp_path / f"{kind}-{seed}"
            done = recover(
                student,
                subject.folder,
                subject.corpus,
                out,
                tokens=200_000,
                seed=seed,
                store=tmp_path / f"teacher-{seed}",
                eval_sequences=16,
                **settings,
            )
            found[kind].append(average(subject.losses(load(out if done.out is not None else student).eval())))
    for kind, values in found.items():
        results.add("demo", f"prune by reap, recovered: {kind}", "50 %", values)
    claim(
        "recovery/lm_kl",
        all(both < alone for both, alone in zip(found["LM + KL"], found["KL"], strict=True)),
        "after 200,000 tokens, nats a token: "
        + ", ".join(f"{kind} {' '.join(f'{value:.4f}' for value in values)}" for kind, values in found.items())
        + f" by seed; before {spread(before)}; demo model",
    )  # fmt: skip


def test_compressed_experts(tmp_path: Path, corpus: Path, claim: Callable) -> None:
    """Compressed Experts (2025): with vectors for two of four experts, tuning recovers more than without them."""
    gaps = []
    numbers = []
    for seed in SEEDS:
        changes = (f"data.corpus={corpus}", "moe.num_experts_per_tok=4", f"run.seed={seed}")
        subject = Subject("k4", trained(tmp_path / str(seed), *changes), open_corpus(corpus))
        text = list(
            document_batches(
                subject.corpus, subject.tokenizer, "train", sequence_length=128, batch_size=8, max_tokens=400_000
            )
        )
        tuned = {}
        for kind in ("all of K", "vectors", "fewer"):
            model = load(subject.folder)
            if kind == "vectors":
                model = install_compressed(model, 2)
            if kind == "fewer":
                model = _drop_slots(model, 2)
            tune(model, text)
            tuned[kind] = average(subject.losses(model.eval()))
        gaps.append(tuned)
        numbers.append(", ".join(f"{kind} {value:.3f}" for kind, value in tuned.items()))
    regained = [(one["fewer"] - one["vectors"]) / (one["fewer"] - one["all of K"]) for one in gaps]
    claim(
        "compaction/compressed_experts",
        min(regained) > 0.5,
        f"K 4, 2 of them vectors, tuned alike, nats a token by seed: {'; '.join(numbers)}; share of the gap that the "
        "vectors regain: " + ", ".join(f"{share:.0%}" for share in regained),
    )


def tune(model: Any, text: list[dict[str, torch.Tensor]]) -> None:
    """`tune_compressed` for any model."""
    if getattr(model.config, "collegium", None) and "shrunk" in model.config.collegium:
        tune_compressed(model, text, steps=STEPS, lr=3e-4)
        return
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    for step in range(STEPS):
        batch = text[step % len(text)]
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _drop_slots(model: Any, count: int) -> Any:
    """The model without each token's `count` least weighted experts; the other weights stay as they are."""

    def fewer(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, index, weight = args[:3]
        weight, order = weight.sort(dim=1, descending=True, stable=True)
        index = index.gather(1, order)
        return (x, index[:, :-count].contiguous(), weight[:, :-count].contiguous(), *args[3:])

    for site in sites(model):
        site.experts.register_forward_pre_hook(fewer)
    return model
