"""Planners: what every one must hold to, how domains go together, and the plan that comes out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shrinking import batches, made_up_statistics, made_up_target

from collegium.catalog import get
from collegium.compress.collectors import collectors_for
from collegium.compress.importance import find_importance
from collegium.compress.planners import Budget, GlobalFloor, LayerScores, Uniform, layer_scores, make_plan
from collegium.compress.target import Target, TargetLayer, fewest_kept
from collegium.errors import ConfigError
from collegium.measure.collect import collect
from tiny import tiny_model

PLANNERS = [Uniform(0.5), GlobalFloor(0.5), GlobalFloor(0.75, floor=4), Budget(parameters=0.6), Budget(nbytes=3600)]


def scores_of(values: Any, target: Target) -> list[LayerScores]:
    """Layer scores with the shares ``values [L, E]``."""
    found = []
    for layer, row in zip(target.layers, torch.as_tensor(values, dtype=torch.float64), strict=True):
        order = tuple(row.argsort(descending=True, stable=True).tolist())
        found.append(LayerScores(layer.layer, row / row.sum(), order, torch.full((len(row),), 100)))
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[Target, torch.Tensor, dict[int, frozenset[int]]]:
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    top_groups = draw(st.integers(1, groups))
    E = draw(st.sampled_from([8, 16]))
    K = draw(st.integers(1, 4 if groups == 1 else min(2 * top_groups, 4)))
    L = draw(st.integers(1, 4))
    target = made_up_target(L, E, top_k=K, groups=groups, top_groups=top_groups)
    seed = draw(st.integers(0, 2**16))
    values = torch.rand(L, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-3
    protected = {
        layer: frozenset(draw(st.sets(st.integers(0, E - 1), max_size=2))) for layer in range(L) if draw(st.booleans())
    }
    return target, values, protected


@settings(max_examples=60, deadline=None)
@given(case=cases(), which=st.integers(0, len(PLANNERS) - 1))
def test_every_planner_keeps_what_it_must_and_nothing_worse_than_what_it_drops(case: Any, which: int) -> None:
    target, values, protected = case
    planner = PLANNERS[which]
    scores = scores_of(values, target)
    try:
        choice = planner.choose(scores, target, protected)
    except ConfigError as error:
        assert "layer" in str(error)  # noqa: PT017  (a case without room is a valid answer)
        return
    assert list(choice) == [one.layer for one in target.layers]
    size = target.layers[0].num_experts // target.groups
    for one in scores:
        kept = set(choice[one.layer])
        must = protected.get(one.layer, frozenset())
        assert list(choice[one.layer]) == sorted(kept)
        assert must <= kept
        assert len(kept) >= fewest_kept(len(one.share), target.top_k, target.groups, target.top_groups)
        for group in range(target.groups):
            members = range(group * size, (group + 1) * size)
            assert sum(e in kept for e in members) == len(kept) // target.groups
            free = [float(one.share[e]) for e in members if e in kept and e not in must]
            gone = [float(one.share[e]) for e in members if e not in kept]
            assert not free or not gone or min(free) >= max(gone)
    again = planner.choose(scores, target, protected)
    assert again == choice


@pytest.mark.parametrize("planner", PLANNERS, ids=repr)
def test_planners_are_catalogued_under_their_name(planner: Any) -> None:
    assert get("planner", planner.name) is type(planner)


@pytest.mark.parametrize("planner", [Uniform(1), GlobalFloor(1), Budget(parameters=1), Budget(nbytes=10**9)])
def test_nothing_is_dropped_without_need(planner: Any) -> None:
    target = made_up_target()
    choice = planner.choose(scores_of(torch.rand(3, 8), target), target, {})
    assert choice == {layer: tuple(range(8)) for layer in range(3)}


def test_uniform_keeps_the_nearest_possible_number() -> None:
    target = made_up_target(1, 10)
    scores = scores_of(torch.rand(1, 10), target)
    for keep, count in ((0.9, 9), (0.7, 7), (0.25, 3), (0.24, 2), (0.2, 2)):
        assert len(Uniform(keep).choose(scores, target, {})[0]) == count
    grouped = made_up_target(1, 16, groups=4, top_groups=2)
    for keep, count in ((0.9, 16), (0.8, 12), (0.6, 8), (0.5, 8)):
        assert len(Uniform(keep).choose(scores_of(torch.rand(1, 16), grouped), grouped, {})[0]) == count


def test_a_ratio_that_leaves_fewer_than_the_router_needs_is_refused() -> None:
    target = made_up_target(top_k=4)
    scores = scores_of(torch.rand(3, 8), target)
    refused = {
        "keep 0.25 leaves layer 0 with 2 of 8": Uniform(0.25),
        "700 bytes": Budget(nbytes=700),
        "0.3 of the parameters": Budget(parameters=0.3),
        "floor 3": GlobalFloor(0.5, floor=3),
    }
    for said, planner in refused.items():
        with pytest.raises(ConfigError, match=rf"{said}.*chooses 4 and needs at least 4 \(a share of 0.5\)"):
            planner.choose(scores, target, {})
    with pytest.raises(ConfigError, match="less than the floors of all layers take, 12 experts"):
        GlobalFloor(0.3).choose(scores, target, {})
    grouped = made_up_target(top_k=4, groups=2, top_groups=1)
    with pytest.raises(ConfigError, match="in 1 of 2 groups and needs at least 8"):
        Uniform(0.5).choose(scores, grouped, {})


@pytest.mark.parametrize(
    "make",
    [lambda: Uniform(0), lambda: Uniform(1.1), lambda: Uniform(float("nan")), lambda: GlobalFloor(-1), lambda: Budget(),
     lambda: GlobalFloor(0.5, floor=0), lambda: Budget(5, 0.5), lambda: Budget(0), lambda: Budget(parameters=2.0)],
)  # fmt: skip
def test_settings_are_checked(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_more_protected_experts_than_room_are_refused() -> None:
    target = made_up_target()
    scores = scores_of(torch.rand(3, 8), target)
    with pytest.raises(ConfigError, match=r"layer 1: experts \[0, 1, 2\] are protected, but the budget keeps 2"):
        Uniform(0.25).choose(scores, target, {1: frozenset({0, 1, 2})})
    grouped = made_up_target(groups=2, top_groups=2)
    with pytest.raises(ConfigError, match=r"experts \[4, 5, 6\] of one routing group"):
        Uniform(0.5).choose(scores, grouped, {1: frozenset({4, 5, 6})})


def test_global_floor_gives_more_to_layers_whose_importance_is_spread() -> None:
    target = made_up_target(2)
    peaked, flat = [100.0, 90, 1, 1, 1, 1, 1, 1], [1.0] * 8
    choice = GlobalFloor(0.5).choose(scores_of([peaked, flat], target), target, {})
    assert (len(choice[0]), len(choice[1])) == (2, 6)
    choice = GlobalFloor(0.5, floor=3).choose(scores_of([peaked, flat], target), target, {})
    assert (len(choice[0]), len(choice[1])) == (3, 5)
    choice = GlobalFloor(0.5).choose(scores_of([peaked, flat], target), target, {0: frozenset({3, 4, 5})})
    assert choice[0] == (0, 1, 3, 4, 5)


def test_budget_takes_all_that_fits_and_no_more() -> None:
    target = made_up_target()
    scores = scores_of(torch.rand(3, 8), target)
    for nbytes, count in ((6000, 8), (5999, 7), (5400, 7), (5399, 6), (2400, 2)):
        assert {len(kept) for kept in Budget(nbytes).choose(scores, target, {}).values()} == {count}
    grouped = made_up_target(groups=2, top_groups=2)
    assert {len(kept) for kept in Budget(5999).choose(scores, grouped, {}).values()} == {6}


def combined(values: Any, **settings: Any) -> LayerScores:
    statistics = made_up_statistics(1, 4, values={"w_sum": values})
    return layer_scores(statistics, 0, find_importance("weighted_frequency"), **settings)


def test_domains_go_together_as_asked() -> None:
    # the first domain is a hundred times as long
    values = [[[500.0, 300, 150, 50], [0, 1, 2, 7]]]
    assert combined(values, combine="pooled").order == (0, 1, 2, 3)
    both = combined(values, combine="sum")
    assert both.order == (3, 0, 1, 2)
    assert both.share.tolist() == pytest.approx([0.25, 0.2, 0.175, 0.375])
    assert combined(values, combine="max").share.tolist() == pytest.approx([0.5 / 1.7, 0.3 / 1.7, 0.2 / 1.7, 0.7 / 1.7])
    # each domain's best, then each domain's second
    assert combined(values, combine="any").order == (3, 0, 1, 2)
    assert set(combined([[[9.0, 8, 7, 1], [0, 1, 2, 7]]], combine="any").order[:2]) == {0, 3}
    assert combined(values, domains=["prose"]).order == (3, 2, 1, 0)
    assert combined(values, domains=["prose"], combine="pooled").order == (3, 2, 1, 0)
    with pytest.raises(ConfigError, match="combine 'mean' is none of"):
        combined(values, combine="mean")
    with pytest.raises(ConfigError, match="domains are code, prose"):
        combined(values, domains=["maths"])


def test_ties_go_to_the_expert_with_more_tokens() -> None:
    statistics = made_up_statistics(1, 4, values={"w_sum": torch.ones(4), "n": torch.tensor([5.0, 9, 5, 7])})
    assert layer_scores(statistics, 0, find_importance("weighted_frequency")).order == (1, 3, 0, 2)


def test_a_domain_without_tokens_is_refused_if_asked_for_and_else_left_out() -> None:
    statistics = made_up_statistics(1, 4)
    for (layer, name), tensor in statistics.tensors.items():
        if name != "n_tokens" and tensor.shape[:1] == (2,):
            statistics.tensors[layer, name][1] = 0
    one = layer_scores(statistics, 0, find_importance("reap"))
    torch.testing.assert_close(one.share, layer_scores(statistics, 0, find_importance("reap"), domains=["code"]).share)
    with pytest.raises(ConfigError, match="domain 'prose' has no tokens in layer 0"):
        layer_scores(statistics, 0, find_importance("reap"), domains=["prose"])


def plan_of(planner: Any = None, statistics: Any = None, target: Any = None, **settings: Any) -> Any:
    statistics = made_up_statistics() if statistics is None else statistics
    return make_plan(statistics, target or made_up_target(), planner or Uniform(0.5), **settings)


def test_a_plan_says_where_it_comes_from() -> None:
    plan = plan_of(importance="random", settings={"seed": 4}, domains=["prose"], mtp="drop")
    assert (plan.method, plan.settings, plan.planner) == ("random", {"seed": 4, "combine": "sum"}, "uniform")
    assert (plan.planner_settings, plan.domains, plan.data, plan.mtp) == (
        {"keep": 0.5}, ("prose",), ("numbers",), "drop",
    )  # fmt: skip
    assert (plan.asked.what, plan.asked.value, plan.reached.experts) == ("keep", 0.5, 12)
    assert sum(plan.layers[0].scores) == pytest.approx(1)
    assert plan.statistics == plan_of().statistics
    assert plan.statistics != plan_of(statistics=made_up_statistics(seed=1)).statistics
    plan.check(made_up_target())


def test_what_is_kept_is_worth_more_than_half() -> None:
    for one in plan_of(importance="reap").layers:
        assert 0.5 < one.expected < 1


def test_pins_and_super_experts_are_kept_in_every_plan() -> None:
    down_max = torch.ones(3, 1, 8)
    down_max[1, 0, 6] = 1000
    values = {"down_max": down_max, "w_ean_sum": torch.tensor([8.0, 7, 6, 5, 4, 3, 0.1, 0.2])}
    statistics = made_up_statistics(values=values)
    for planner in PLANNERS:
        if planner == Budget(nbytes=3600):
            continue
        plan = plan_of(planner, statistics, importance="weighted_ean_sum", pins={2: [7]})
        assert 6 in plan.layers[1].keep
        assert plan.layers[1].protected == (6,)
        assert plan.layers[2].protected == (7,)
        assert "layer 1: super experts [6] are kept" in plan.notes
    bare = plan_of(statistics=statistics, importance="weighted_ean_sum", protect_super_experts=False)
    assert bare.layers[1].keep == (0, 1, 2, 3)
    assert "super experts are not protected" in bare.notes
    with pytest.raises(ConfigError, match="pin names layer 9; the MoE layers are 0, 1, 2"):
        plan_of(pins={9: [0]})
    with pytest.raises(ConfigError, match="pin names expert 8 of layer 1, which has 8"):
        plan_of(pins={1: [8]})


def test_starved_and_unseen_experts_are_listed_with_their_fate() -> None:
    n = torch.full((3, 2, 8), 100.0)
    n[1, :, 3], n[2, 0, 5], n[2, 1, 5] = 0, 15, 16
    n[2, :, 6] = 5
    plan = plan_of(statistics=made_up_statistics(values={"n": n}), importance="frequency")
    assert [note for note in plan.notes if "reached" in note] == [
        "layer 1: no token reached experts [3] (dropped)",
        "layer 2: fewer than 32 tokens reached experts [5, 6] (dropped)",
    ]
    pinned = plan_of(statistics=made_up_statistics(values={"n": n}), importance="frequency", pins={2: [6]})
    assert "layer 2: fewer than 32 tokens reached experts [6] (kept) and [5] (dropped)" in pinned.notes


def test_other_notes() -> None:
    flat = plan_of(GlobalFloor(0.6, floor=2), importance="frequency")
    assert not flat.uniform
    assert "no stock engine loads" in flat.notes[0]
    bare = plan_of(target=made_up_target(fingerprint=None, mtp=True))
    assert any("was not checked" in note for note in bare.notes)
    assert any("multi-token-prediction layers: applying this plan is refused" in note for note in bare.notes)


def test_statistics_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="calibrate this model"):
        plan_of(target=made_up_target(fingerprint="xyz"))
    with pytest.raises(ConfigError, match=r"layer 0 has \(experts, top-k\) \(8, 2\) .* \(8, 1\)"):
        plan_of(target=made_up_target(top_k=1))
    with pytest.raises(ConfigError, match="layer 3"):
        plan_of(target=made_up_target(4))
    short = replace(made_up_target(), layers=(TargetLayer(0, 8, 1, 1),))
    with pytest.raises(ConfigError, match="layer 1"):
        plan_of(target=short)


def test_from_a_model_to_a_plan_for_each_score() -> None:
    model = tiny_model("deepseek_v3")
    names = ["reap", "easy_ep", "tcess", "router_probability"]
    statistics = collect(model, batches(), collectors_for(*names), domains=("code", "prose"), name="tiny")
    layers = tuple(TargetLayer(one.layer, 8, 10, 10) for one in statistics.meta.layers)
    target = Target("tiny", None, "deepseek_v3", 2, layers, 1000, 1000, groups=2, top_groups=1)
    for name in names:
        plan = make_plan(statistics, target, Uniform(0.5), importance=name, combine="any")
        for one in plan.layers:
            assert [e < 4 for e in one.keep] == [True, True, False, False]
