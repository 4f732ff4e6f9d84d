"""Neuron scores are pure functions of the statistics; plans keep the best neurons there is room for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stream import DOMAINS, batches, folder_of
from torch import Tensor

from collegium.catalog import methods
from collegium.compress.collectors_outputs import HiddenSums
from collegium.compress.gradients import HiddenGradients
from collegium.compress.neurons import find_neuron_score, neuron_scores, plan_neurons
from collegium.compress.plan import Plan
from collegium.compress.stream import calibrate
from collegium.compress.target import Target, TargetLayer
from collegium.errors import ConfigError
from collegium.measure.collect import weights_of
from collegium.measure.statistics import Entry, LayerEntry, Statistics, StatisticsMeta
from collegium.measure.super_experts import DownMax
from collegium.models import load
from collegium.models.checkpoint import open_checkpoint
from collegium.sites import sites

E, WIDTH = 4, 32
NEURON_SUMS = ("h_sq", "h_abs", "dh_sq", "hdh_sq")


def made_up(
    layers: int = 3,
    *,
    f: int = WIDTH,
    seed: int = 0,
    unseen: Sequence[int] = (),
    loudest: tuple[int, int] | None = None,
    without: Sequence[str] = (),
    scale: Mapping[int, float] | None = None,
) -> Statistics:
    """Random statistics of neurons.

    Args:
        unseen: experts that no token reached, in every layer.
        loudest: (layer, expert) that is a super expert.
        without: statistics that are not there.
        scale: layer -> what its sums of neurons are multiplied by.
    """
    entries = [
        Entry(name="n", collector="made_up", axes=("E",), dtype="int64", by_domain=True),
        Entry(name="n_tokens", collector="made_up", axes=(), dtype="int64", by_domain=True),
        *(Entry(name=name, collector="made_up", axes=("E", "f")) for name in NEURON_SUMS),
        Entry(name="down_max", collector="made_up", axes=("E",), merge="max"),
        Entry(name="down_argmax", collector="made_up", axes=("E", 2), dtype="int64", merge="where", of="down_max"),
    ]
    entries = [entry for entry in entries if entry.name not in without]
    meta = StatisticsMeta(
        model="made up", fingerprint="abc", family="none", num_layers=layers, data=("numbers",), domains=("all",),
        tokens=1000, statistics=tuple(entries), collectors={"made_up": {}}, created="2026-01-01T00:00:00+00:00",
        collegium="0",
        layers=tuple(
            LayerEntry(layer=i, path=f"layers.{i}", num_experts=E, top_k=2, hidden_size=6, intermediate_size=f)
            for i in range(layers)
        ),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[tuple[int, str], Tensor] = {}
    for layer in meta.layers:
        for entry in entries:
            shape = entry.shape(layer, 1)
            tensor = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
            if entry.dtype == "int64":
                tensor = torch.randint(40, 400, shape, generator=generator)
            if entry.name == "n_tokens":
                tensor.fill_(1000)
            if entry.name in NEURON_SUMS:
                tensor *= (scale or {}).get(layer.layer, 1.0)
            if entry.name == "down_max" and loudest is not None and loudest[0] == layer.layer:
                tensor[loudest[1]] = 1e4
            if entry.axes[:1] == ("E",):
                tensor.index_fill_(int(entry.by_domain), torch.tensor(list(unseen), dtype=torch.long), 0)
            tensors[layer.layer, entry.name] = tensor
    return Statistics(meta, tensors)


def target_of(statistics: Statistics, **changes: Any) -> Target:
    layers = tuple(
        TargetLayer(one.layer, E, 200 + 20 * one.intermediate_size, 100, one.intermediate_size, 20, 10)
        for one in statistics.meta.layers
    )
    fields: dict[str, Any] = {
        "model": "made up", "fingerprint": "abc", "family": "none", "top_k": 2, "layers": layers,
        "nbytes": 100_000, "parameters": 50_000,
    }  # fmt: skip
    return Target(**(fields | changes))


def plan_of(statistics: Statistics, **settings: Any) -> Plan:
    return plan_neurons(statistics, target_of(statistics), **settings)


def mask_of(plan: Plan, f: int = WIDTH) -> list[Tensor]:
    """``[E, f]`` bool of each layer: what is kept."""
    found = []
    for layer in plan.layers:
        mask = torch.zeros(E, f, dtype=torch.bool)
        for e, ids in enumerate(layer.neurons or [range(f)] * E):
            mask[e, list(ids)] = True
        found.append(mask)
    return found


def test_every_score_is_in_the_catalogue() -> None:
    assert {one.name for one in neuron_scores()} == {one.name for one in methods("neurons")}
    with pytest.raises(ConfigError, match="heapr"):
        find_neuron_score("magic")


@pytest.mark.parametrize("name", [one.name for one in neuron_scores()])
def test_what_every_score_holds_to(name: str) -> None:
    score, statistics = find_neuron_score(name), made_up(unseen=[2])
    before = {key: tensor.clone() for key, tensor in statistics.tensors.items()}
    for layer in statistics.layers:
        found = score(statistics, layer)
        assert found.shape == (E, WIDTH)
        assert found.dtype == torch.float64
        assert bool(torch.isfinite(found).all())
        assert bool((found[[0, 1, 3]] >= 0).all())
        assert not score.needs or bool((found[2] == -1).all())
        assert torch.equal(found, score(statistics, layer))
    assert all(torch.equal(tensor, before[key]) for key, tensor in statistics.tensors.items())
    with pytest.raises(ConfigError, match="no setting 'colour'"):
        score(statistics, 0, colour=1)
    for need in score.needs:
        if need not in ("n", "n_tokens"):
            with pytest.raises(ConfigError, match=f"needs {need}.*--collect {name}"):
                score(made_up(without=[need]), 0)


def test_what_the_scores_are() -> None:
    statistics = made_up()
    n = statistics.get(1, "n")[:, None].double()
    h_sq, h_abs, dh_sq, hdh_sq = (statistics.get(1, name) for name in NEURON_SUMS)
    for name, chosen, wanted in (
        ("heapr", {}, h_sq / n * dh_sq / n),
        ("heapr", {"weight_by_frequency": True}, h_sq / n * dh_sq / 1000),
        ("heapr_per_token", {}, hdh_sq / n),
        ("heapr_per_token", {"weight_by_frequency": True}, hdh_sq / 1000),
        ("minitron", {}, (h_sq / n).sqrt()),
        ("minitron", {"absolute": True}, h_abs / n),
    ):
        torch.testing.assert_close(find_neuron_score(name)(statistics, 1, **chosen), wanted)
    random = find_neuron_score("random")
    assert not torch.equal(random(statistics, 0), random(statistics, 1))
    assert not torch.equal(random(statistics, 0), random(statistics, 0, seed=1))


@pytest.mark.parametrize(
    ("f", "share", "width"),
    [(768, 0.75, 576), (768, 0.5, 384), (1408, 0.8, 1152), (256, 0.8, 192), (128, 0.51, 64), (64, 0.5, 32),
     (32, 0.5, 16), (16, 0.5, 8), (16, 0.1, 8), (12, 0.5, 6), (12, 0.01, 1), (768, 1.0, 768)],
)  # fmt: skip
def test_uniform_widths_are_multiples_that_kernels_like(f: int, share: float, width: int) -> None:
    plan = plan_of(made_up(2, f=f), share=share)
    assert {int(row.sum()) for mask in mask_of(plan, f) for row in mask} == {width}
    assert plan.portable
    assert {layer.op for layer in plan.layers} == {"identity" if width == f else "slim"}


@pytest.mark.parametrize("name", [one.name for one in neuron_scores()])
def test_uniform_keeps_the_best_of_each_expert(name: str) -> None:
    statistics = made_up()
    plan = plan_of(statistics, score=name, share=0.4, multiple=1)
    for layer, mask in zip(plan.layers, mask_of(plan), strict=True):
        scores = find_neuron_score(name)(statistics, layer.layer)
        assert mask.sum(1).tolist() == [13] * E
        for kept, row in zip(mask, scores, strict=True):
            assert row[kept].min() >= row[~kept].max()
    assert plan.asked.what == "neurons"
    assert (plan.method, plan.planner) == (name, "neurons_uniform")
    assert plan.reached.of_parameters - plan.reached.parameters == 3 * E * 19 * 10
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.sampled_from([0.3, 0.5, 0.7, 0.9]), loud=st.floats(0.1, 10))
def test_per_layer_widths_are_the_best_there_is_room_for(seed: int, share: float, loud: float) -> None:
    statistics = made_up(seed=seed, scale={1: loud})
    plan = plan_of(statistics, share=share, mode="per_layer", multiple=8)
    scores = [find_neuron_score("heapr")(statistics, layer) for layer in range(3)]
    worth = [[float(one.sort(descending=True).values[:, :width].sum()) for width in (8, 16, 24, 32)] for one in scores]
    room = int(share * 3 * E * WIDTH + 0.5)
    best = max(
        sum(worth[i][w] for i, w in enumerate(widths))
        for widths in itertools.product(range(4), repeat=3)
        if sum(8 * (w + 1) for w in widths) * E <= room
    )
    masks = mask_of(plan)
    assert all(len(set(mask.sum(1).tolist())) == 1 for mask in masks)
    assert sum(int(mask.sum()) for mask in masks) <= room
    assert sum(float(one[mask].sum()) for one, mask in zip(scores, masks, strict=True)) == pytest.approx(best)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.floats(0.05, 1), name=st.sampled_from(["heapr", "minitron", "random"]))
def test_ragged_is_one_ranking(seed: int, share: float, name: str) -> None:
    statistics = made_up(seed=seed, unseen=[1])
    plan = plan_of(statistics, score=name, share=share, mode="ragged")
    score = find_neuron_score(name)
    scores = torch.stack([score(statistics, layer) for layer in range(3)])
    if not score.in_loss:
        total = scores.clamp(min=0).sum((1, 2), keepdim=True)
        scores = torch.where(scores < 0, scores, scores / total)
    kept = torch.stack(mask_of(plan))
    assert int(kept.sum()) == int(share * kept.numel() + 0.5)
    if bool(kept.any()) and not bool(kept.all()):
        assert scores[kept].min() >= scores[~kept].max()


def test_only_losses_are_compared_across_layers() -> None:
    loud = {1: 1e6}
    plans = {
        name: [mask_of(plan_of(made_up(scale=scale), score=name, mode="ragged", share=0.4)) for scale in ({}, loud)]
        for name in ("heapr", "minitron")
    }
    assert all(torch.equal(a, b) for a, b in zip(*plans["minitron"], strict=True))
    assert bool(plans["heapr"][1][1].all())


def test_experts_that_no_token_reached_go_first_and_are_listed() -> None:
    plan = plan_of(made_up(unseen=[1, 3]), mode="ragged", share=0.5)
    assert all(not mask[[1, 3]].any() and mask[[0, 2]].all() for mask in mask_of(plan))
    assert any("layer 2" in note and "[1, 3]" in note and "go first, and 0 " in note for note in plan.notes)
    assert not plan.portable
    assert any("0 to 32 neurons" in note for note in plan.notes)
    assert all(layer.keep == tuple(range(E)) for layer in plan.layers)


def test_protected_experts_keep_all_their_neurons_where_widths_may_differ() -> None:
    statistics = made_up(loudest=(1, 2), scale={1: 1e-6})
    plan = plan_of(statistics, mode="ragged", share=0.4, pins={0: [3]})
    masks = mask_of(plan)
    assert bool(masks[1][2].all())
    assert bool(masks[0][3].all())
    assert plan.layers[1].protected == (2,)
    assert not mask_of(plan_of(statistics, mode="ragged", share=0.4, protect_super_experts=False))[1][2].all()
    with pytest.raises(ConfigError, match="protected experts alone have 64"):
        plan_of(statistics, mode="ragged", share=0.1, pins={0: [3]})
    uniform = plan_of(statistics, share=0.5)
    assert {int(row.sum()) for mask in mask_of(uniform) for row in mask} == {16}
    assert any("protected experts [2] lose neurons" in note for note in uniform.notes)


def test_what_heapr_takes_costs_less_than_what_chance_takes(tmp_path: Path) -> None:
    source, f = folder_of("qwen3_moe", tmp_path, moe_intermediate_size=32), 32
    statistics = calibrate(
        source, batches(6), [HiddenSums(), HiddenGradients(), DownMax()], tmp_path / "s", domains=DOMAINS
    )
    target, other = Target.of(open_checkpoint(source)), batches(2, seed=1)

    def distribution(plan: Plan | None) -> Tensor:
        model = load(source)
        layers = {} if plan is None else {layer.layer: layer.neurons for layer in plan.layers}
        with torch.no_grad():
            for site in sites(model):
                for e, ids in enumerate(layers.get(site.layer, ())):
                    weights_of(site).down_t[e][[k for k in range(f) if k not in set(ids)]] = 0
            return torch.cat([model(batch["input_ids"]).logits.log_softmax(-1) for batch in other])

    whole, cost = distribution(None), {}
    for mode in ("uniform", "ragged"):
        for score in ("heapr", "heapr_per_token", "minitron", "random"):
            log_p = distribution(plan_neurons(statistics, target, score=score, share=0.5, mode=mode))
            cost[mode, score] = float((whole.exp() * (whole - log_p)).sum(-1).mean())
        assert cost[mode, "heapr"] < 0.7 * cost[mode, "random"], cost
        assert cost[mode, "heapr_per_token"] < 0.7 * cost[mode, "random"], cost
        assert cost[mode, "minitron"] < cost[mode, "random"], cost
    assert cost["ragged", "heapr"] < cost["uniform", "heapr"], cost


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"mode": "square"}, "mode 'square'"), ({"share": 0}, "share"), ({"share": 1.5}, "share"),
     ({"multiple": 0}, "multiple"), ({"score": "magic"}, "magic"), ({"pins": {7: [0]}}, "layer 7")],
)  # fmt: skip
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(made_up(), **changes)


def test_statistics_of_another_model_are_refused() -> None:
    statistics = made_up()
    with pytest.raises(ConfigError, match="32 neurons in the statistics and 48 in the model"):
        plan_neurons(statistics, target_of(made_up(f=48)))
    with pytest.raises(ConfigError, match="fingerprint"):
        plan_neurons(statistics, target_of(statistics, fingerprint="other"))
