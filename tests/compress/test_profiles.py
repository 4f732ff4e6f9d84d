"""Profiles: ranks and keys are those of the statistics, a text finds the domain it is of, foreign files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shrinking import batches, made_up_statistics, made_up_target

from collegium.compress.collectors import RouterSums
from collegium.compress.mask import apply_mask
from collegium.compress.planners import Uniform, make_plan
from collegium.compress.profiles import Profiles, _checksum, profile_mask, retrieval
from collegium.compress.profiles_probe import text_key
from collegium.compress.target import Target, TargetLayer
from collegium.data import Corpus, Document, document_batches, train_tokenizer
from collegium.errors import ConfigError, DataError, ModelError, StatisticsError
from collegium.measure.collect import collect
from collegium.measure.statistics import Statistics
from collegium.measure.super_experts import DownMax
from collegium.routing import Routing
from collegium.sites import Site, sites, tap
from tiny import tiny_model

DOMAINS = ("code", "prose")


def profiles(**changes: Any) -> Profiles:
    return Profiles.from_statistics(
        made_up_statistics(**changes), made_up_target(fingerprint=changes.get("fingerprint", "abc"))
    )


def target_of(model: Any) -> Target:
    found = sites(model)
    layers = tuple(TargetLayer(site.layer, site.num_experts, 0, 0) for site in found)
    return Target("tiny", None, found[0].family, found[0].top_k, layers, 0, 0)


def measured(model: Any, *collectors: Any) -> Profiles:
    given = collectors or (RouterSums(),)
    statistics = collect(model, batches(), [*given, DownMax()], domains=DOMAINS, name="tiny")
    return Profiles.from_statistics(statistics, target_of(model))


def test_ranks_and_keys_are_those_of_the_statistics() -> None:
    statistics = made_up_statistics(values={"down_max": torch.ones(3, 1, 1)})  # no super experts
    found = Profiles.from_statistics(statistics, made_up_target())
    assert found.meta.tasks == DOMAINS
    assert found.meta.tokens == (1000, 1000)
    for number, domain in enumerate(DOMAINS):
        mean = statistics.get(0, "z_topk_sum", domain) / 1000
        torch.testing.assert_close(found.key[number].double(), mean, rtol=1e-6, atol=0)
        for layer in range(3):
            order = statistics.get(layer, "z_topk_sum", domain).argsort(descending=True)
            assert found.rank[number, layer, order].equal(torch.arange(8, dtype=torch.int16))
        plan = make_plan(
            statistics,
            made_up_target(),
            Uniform(0.5),
            importance="tcess",
            domains=[domain],
            protect_super_experts=False,
        )
        assert [one.keep for one in found.plan_for(domain, 0.5).layers] == [one.keep for one in plan.layers]


def test_super_experts_come_first_and_other_scores_may_rank() -> None:
    huge = torch.ones(3, 1, 8)
    huge[0, 0, 6] = 1e6
    found = profiles(values={"down_max": huge, "z_topk_sum": torch.arange(8.0).flip(0)[None, None].expand(3, 2, 8)})
    assert found.rank[:, 0].tolist() == [[1, 2, 3, 4, 5, 6, 0, 7]] * 2
    assert found.rank[:, 1].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]] * 2
    by_output = Profiles.from_statistics(
        made_up_statistics(values={"w_ean_sum": torch.arange(8.0)[None, None].expand(3, 2, 8), "n": 100,
                                   "down_max": torch.ones(3, 1, 1)}),
        made_up_target(), importance="reap",
    )  # fmt: skip
    assert by_output.rank[0, 1].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_routing_groups_keep_as_many_each() -> None:
    order = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])[None, None].expand(3, 2, 8)
    statistics = made_up_statistics(values={"z_topk_sum": order, "down_max": torch.ones(3, 1, 1)})
    found = Profiles.from_statistics(statistics, made_up_target(groups=2, top_groups=1))
    plan = found.plan_for("code", 0.5)
    assert {one.keep for one in plan.layers} == {(0, 1, 4, 5)}
    assert (plan.groups, plan.top_groups) == (2, 1)
    with pytest.raises(ConfigError, match="needs at least"):
        found.plan_for("code", 0.25)
    with pytest.raises(ConfigError, match="no task is named 'law'"):
        found.plan_for("law")


def test_layers_may_differ_in_size() -> None:
    small, large = made_up_statistics(layers=1, experts=4), made_up_statistics(layers=1, experts=8)
    entry = large.meta.layers[0].model_copy(update={"layer": 1, "path": "layers.1"})
    meta = small.meta.model_copy(update={"layers": (*small.meta.layers, entry), "num_layers": 2})
    tensors = {**small.tensors, **{(1, name): tensor for (_, name), tensor in large.tensors.items()}}
    target = made_up_target(layers=2)
    layers = (TargetLayer(0, 4, 200, 100), TargetLayer(1, 8, 200, 100))
    found = Profiles.from_statistics(Statistics(meta, tensors), replace(target, layers=layers))
    assert found.rank.shape == (2, 2, 8)
    assert found.rank[:, 0, 4:].eq(-1).all()
    assert [len(one.keep) for one in found.plan_for("prose", 0.5).layers] == [2, 4]


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    found = profiles()
    found.save(tmp_path / "p.safetensors")
    again = Profiles.load(tmp_path / "p.safetensors")
    assert again.meta == found.meta
    assert again.rank.equal(found.rank)
    assert again.key.equal(found.key)


def change(path: Path, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Another meta or other tensors, with a checksum that fits them."""
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["collegium"])
    tensors = load_file(path)
    edit(meta, tensors)
    text = json.dumps(meta)
    save_file(tensors, path, metadata={"collegium": text, "checksum": _checksum(text, tensors)})


NONSENSE: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], object], str]] = {
    "schema": (lambda meta, _: meta.update(schema_version=2), "'schema_version'"),
    "unknown field": (lambda meta, _: meta.update(extra=1), "'extra'"),
    "negative size": (lambda meta, _: meta["layers"][0].update(expert_nbytes=-1), "expert_nbytes"),
    "task twice": (lambda meta, _: meta.update(tasks=["code", "code"]), "repeat a name"),
    "one more task": (lambda meta, _: meta.update(tasks=["a", "b", "c"], tokens=[1, 1, 1]), "'rank' is"),
    "rank twice": (lambda _, tensors: tensors["rank"][0, 0].zero_(), "'rank' of layer 0"),
    "no number": (lambda _, tensors: tensors["key"][0].fill_(torch.nan), "'key' holds NaN"),
    "dtype": (lambda _, tensors: tensors.update(rank=tensors["rank"].int()), "'rank' is torch.int32"),
    "no dtype of numpy": (lambda _, tensors: tensors.update(key=tensors["key"].bfloat16()), "'key' is torch.bfloat16"),
    "no axis": (lambda _, tensors: tensors.update(key=torch.tensor(1.0)), "'key' is torch.float32"),
    "another tensor": (lambda _, tensors: tensors.update(more=torch.ones(1)), "no profiles"),
    "groups": (lambda meta, _: meta.update(groups=3, top_groups=1), "do not fit"),
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_is_refused_and_named(nonsense: str, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    profiles().save(path)
    edit, message = NONSENSE[nonsense]
    change(path, edit)  # type: ignore[arg-type]
    with pytest.raises(StatisticsError, match=message):
        Profiles.load(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    profiles().save(path)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-3] ^= 1
    for damaged in (b"", content[:-10], content[:4], bytes(flipped), b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(StatisticsError, match=r"p\.safetensors"):
            Profiles.load(path)
    with pytest.raises(StatisticsError, match="no profiles"):
        Profiles.load(tmp_path / "missing")
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(StatisticsError, match="another safetensors file"):
        Profiles.load(path)


def test_profiles_of_more_tasks_are_added() -> None:
    both = profiles().add(profiles(domains=("law", "sums"), seed=1))
    assert both.meta.tasks == ("code", "prose", "law", "sums")
    assert both.rank.shape[0] == both.key.shape[0] == len(both.meta.tokens) == 4
    with pytest.raises(ConfigError, match="both have a task 'code'"):
        profiles().add(profiles())
    with pytest.raises(ConfigError, match="fingerprint differs"):
        profiles().add(profiles(domains=("law",), fingerprint="other"))


def test_statistics_of_another_model_or_without_logits_are_refused() -> None:
    with pytest.raises(ConfigError, match="calibrate this model"):
        Profiles.from_statistics(made_up_statistics(), made_up_target(fingerprint="other"))
    with pytest.raises(ConfigError, match="calibrate this model"):
        Profiles.from_statistics(made_up_statistics(experts=4), made_up_target())
    model = tiny_model("qwen3_moe")
    statistics = collect(model, batches(), [DownMax()], domains=DOMAINS, name="tiny")
    with pytest.raises(ConfigError, match="z_topk_sum"):
        Profiles.from_statistics(statistics, target_of(model))


class Runs:
    """Which blocks compute."""

    def __init__(self, model: Any) -> None:
        self.seen: list[int] = []
        for site in sites(model):
            site.experts.register_forward_hook(lambda *_, layer=site.layer: self.seen.append(layer))


@pytest.mark.parametrize("collector", [RouterSums(), RouterSums(slots=1), RouterSums(share=0.6)])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "llama4_text"])
def test_the_key_of_a_text_is_that_of_its_statistics_and_no_expert_runs(family: str, collector: RouterSums) -> None:
    model = tiny_model(family)
    ids = torch.arange(5, 17)
    text = [{"input_ids": ids[None], "domain": torch.tensor([0])}]
    statistics = collect(model, text, [collector], domains=("code",), name="tiny")
    found = Profiles.from_statistics(statistics, target_of(model))
    runs = Runs(model)
    key = text_key(model, found.meta, ids)
    torch.testing.assert_close(key, found.key[0])
    assert runs.seen == []
    assert not model.training
    assert key.ne(0).any()
    with torch.no_grad():  # nothing is left behind
        model(input_ids=ids[None])
    assert runs.seen == [site.layer for site in sites(model)]


def test_a_text_is_found_by_either_distance() -> None:
    model = tiny_model("qwen3_moe")
    found = measured(model)
    for number, task in enumerate(DOMAINS):
        for distance in ("l2", "cosine"):
            match = found.nearest(found.key[number] * 1.01, 10, distance=distance)  # type: ignore[arg-type]
            assert match.task == task
            assert match.distances[0][0] == task
            assert match.distances[0][1] < match.distances[1][1]
    # cosine does not see how large logits are
    match = found.nearest(found.key[1] * 30, 10, distance="cosine")
    assert match.task == "prose"
    assert match.distances[0][1] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ConfigError, match="distance 'manhattan'"):
        found.nearest(found.key[0], 1, distance="manhattan")  # type: ignore[arg-type]


def test_another_model_is_refused() -> None:
    found = measured(tiny_model("qwen3_moe"))
    with pytest.raises(ModelError, match="this model has"):
        text_key(tiny_model("qwen3_moe", num_local_experts=4), found.meta, torch.arange(4))


class Chosen:
    def __init__(self) -> None:
        self.experts: dict[int, set[int]] = {}

    def __call__(self, site: Site, x: torch.Tensor, routing: Routing) -> None:
        self.experts.setdefault(site.layer, set()).update(routing.expert.tolist())


def test_only_the_best_experts_of_the_task_are_chosen_under_its_mask() -> None:
    model = tiny_model("qwen3_moe")
    found, chosen = measured(model), Chosen()
    ids = batches()[0]["input_ids"]
    with profile_mask(model, found, "prose", 0.5), tap(model, chosen), torch.no_grad():
        masked = model(ids).logits
    for place, site in enumerate(sites(model)):
        best = set((found.rank[1, place] < 4).nonzero().flatten().tolist())
        assert chosen.experts[site.layer] <= best
    with apply_mask(model, found.plan_for("prose", 0.5)), torch.no_grad():
        assert model(ids).logits.equal(masked)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Two domains that share few tokens."""
    draw = np.random.default_rng(0)
    words = {"code": ["def", "return", "(x)", "==", "self"], "prose": ["river", "moon", "stone", "wind", "rain"]}
    rows = []
    for number in range(24):
        split = "valid" if number % 2 else "train"
        for domain, own in words.items():
            rows.append((Document(" ".join(draw.choice(own, 80)), domain, str(number)), split))
    return Corpus("two", rows)  # type: ignore[arg-type]


def test_held_out_prompts_find_their_domain(corpus: Corpus, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(corpus, 270, tmp_path / "tokenizer")
    model = tiny_model("qwen3_moe", vocab_size=270, hidden_size=64)
    text = document_batches(corpus, tokenizer, "train", sequence_length=64, batch_size=4)
    statistics = collect(model, text, [RouterSums()], domains=corpus.domains, name="tiny")
    found = Profiles.from_statistics(statistics, target_of(model))
    result = retrieval(found, model, tokenizer, corpus, length=64, prompts=8)
    assert result.prompts >= 12
    assert result.accuracy > 0.9
    right = sum(counts.get(task, 0) for task, counts in result.found.items())
    assert result.accuracy == right / result.prompts
    match = found.query(model, tokenizer, "river moon stone wind rain river moon")
    assert match.task == "prose"
    with pytest.raises(ConfigError, match="empty"):
        found.query(model, tokenizer, "")
    with pytest.raises(DataError, match="no document of 4096 tokens"):
        retrieval(found, model, tokenizer, corpus, length=4096)
