"""Groupings: what every one must hold to, and what each of them is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shrinking import batches
from torch import Tensor

from collegium.catalog import get, methods
from collegium.compress.collectors import COLLECTORS
from collegium.compress.grouping import (
    Grouping,
    Groups,
    McSmoe,
    PartialPreservation,
    Random,
    Ream,
    SubMoe,
    find_grouping,
    group_shares,
    groupings,
)
from collegium.compress.grouping.partial_preservation import Similarity
from collegium.compress.grouping.parts import logit_cosines, output_cosines
from collegium.compress.grouping.sub_moe import kernel_kmeans
from collegium.compress.importance import find_importance
from collegium.compress.planners import LayerScores, layer_scores
from collegium.errors import ConfigError
from collegium.measure.collect import collect
from collegium.measure.statistics import Entry, LayerEntry, Statistics, StatisticsMeta
from tiny import tiny_model

EVERY: list[Grouping] = [
    McSmoe(), SubMoe(), Ream(), Ream(most=20), Random(),
    PartialPreservation(), PartialPreservation(similarity="logits"),
]  # fmt: skip
every_grouping = pytest.mark.parametrize("grouping", EVERY, ids=repr)


def statistics_of(logits: Tensor, outputs: Tensor, tokens: Tensor) -> Statistics:
    """Of router ``logits [T, E]`` and the experts' ``outputs [E, T, d]`` for the same tokens."""
    E = len(tokens)
    shapes = {"n": ("E",), "z_gram": ("E", "E"), "out_cos": ("E", "E"), "out_cos_n": ()}
    meta = StatisticsMeta(
        model="made up", family="none", num_layers=1, data=("numbers",), domains=("all",), tokens=100,
        layers=(LayerEntry(layer=0, path="0", num_experts=E, top_k=1, hidden_size=4, intermediate_size=4),),
        statistics=tuple(
            Entry(name=name, collector="c", axes=axes, dtype="float64" if axes == ("E", "E") else "int64")
            for name, axes in shapes.items()
        ),
        collectors={"c": {}}, created="", collegium="0",
    )  # fmt: skip
    unit = torch.nn.functional.normalize(outputs.double(), dim=2)
    values = {
        "n": tokens.long(),
        "z_gram": logits.double().T @ logits.double(),
        "out_cos": torch.einsum("atd,btd->ab", unit, unit),
        "out_cos_n": torch.tensor(outputs.shape[1]),
    }
    return Statistics(meta, {(0, name): value for name, value in values.items()})


def made_up(E: int, seed: int) -> tuple[LayerScores, Statistics]:
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(E, generator=generator, dtype=torch.float64) + 0.1
    tokens = torch.randperm(1000, generator=generator)[:E]  # all different: ties go by id
    logits, outputs = torch.randn(30, E, generator=generator), torch.randn(E, 20, 6, generator=generator)
    return scores_of(share, tokens), statistics_of(logits, outputs, tokens)


def scores_of(share: Tensor, tokens: Tensor) -> LayerScores:
    return LayerScores(0, share / share.sum(), tuple(share.argsort(descending=True, stable=True).tolist()), tokens)


def best_of(scores: LayerScores, routing_groups: int, each: int) -> tuple[int, ...]:
    size = len(scores.order) // routing_groups
    found: list[int] = []
    for group in range(routing_groups):
        found += [e for e in scores.order if e // size == group][:each]
    return tuple(sorted(found))


@st.composite
def cases(draw: st.DrawFn) -> tuple[LayerScores, Statistics, tuple[int, ...], frozenset[int], int]:
    routing_groups = draw(st.sampled_from([1, 1, 2, 4]))
    size = draw(st.integers(2, 12 // routing_groups))
    scores, statistics = made_up(routing_groups * size, draw(st.integers(0, 1 << 16)))
    keep = best_of(scores, routing_groups, draw(st.integers(1, size)))
    protected = draw(st.sets(st.sampled_from(keep), max_size=3))
    return scores, statistics, keep, frozenset(protected), routing_groups


def test_every_grouping_is_among_them() -> None:
    assert {type(one) for one in EVERY} == set(groupings())
    assert [one.name for one in methods("grouping")] == [one.name for one in groupings()]
    for one in EVERY:
        assert get("grouping", one.name) is type(one)


def test_groupings_work_with_what_a_calibration_pass_gathers() -> None:
    wanted = {need for one in EVERY for need in one.needs}
    collectors = [one() for one in COLLECTORS if wanted & {entry.name for entry in one.statistics}]
    model = tiny_model("qwen3_moe")
    statistics = collect(model, batches(2), collectors, domains=("a", "b"), name="tiny")
    layer = statistics.layers[0]
    scores = layer_scores(statistics, layer, find_importance("frequency"))
    for cosines in (logit_cosines(statistics, layer), output_cosines(statistics, layer)):
        torch.testing.assert_close(cosines.diagonal(), torch.ones(len(cosines), dtype=torch.float64))
        assert cosines.abs().max() < 1 + 1e-6
    for grouping in EVERY:
        assert len(grouping.group(scores, best_of(scores, 1, 4), statistics, frozenset(), 1)) == 4


@every_grouping
@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_groups_are_what_a_plan_needs(
    grouping: Grouping, case: tuple[LayerScores, Statistics, tuple[int, ...], frozenset[int], int]
) -> None:
    scores, statistics, keep, protected, routing_groups = case
    E = len(scores.order)
    size = E // routing_groups
    found = grouping.group(scores, keep, statistics, protected, routing_groups)
    assert found == grouping.group(scores, keep, statistics, protected, routing_groups)
    members = [e for group in found for e in group]
    assert len(set(members)) == len(members)
    assert [group[0] for group in found] == sorted(group[0] for group in found)
    assert all(list(group[1:]) == sorted(group[1:]) for group in found)
    assert all(len({e // size for e in group}) == 1 for group in found)
    counts = [sum(group[0] // size == one for group in found) for one in range(routing_groups)]
    assert counts == [sum(e // size == one for e in keep) for one in range(routing_groups)]
    assert {(e,) for e in protected} <= set(found)
    # only where all kept ones are protected have the others none to join
    full = [one for one in range(routing_groups) if all(e in protected for e in keep if e // size == one)]
    assert sorted(set(range(E)) - set(members)) == [e for e in range(E) if e not in keep and e // size in full]
    for group in found:
        shares = grouping.weights(scores, group, statistics)
        assert len(shares) == len(group)
        assert min(shares) >= 0
        assert sum(shares) == pytest.approx(1)


@every_grouping
@pytest.mark.parametrize("routing_groups", [1, 2])
def test_where_all_are_kept_all_are_alone(grouping: Grouping, routing_groups: int) -> None:
    scores, statistics = made_up(8, 0)
    found = grouping.group(scores, tuple(range(8)), statistics, frozenset({3}), routing_groups)
    assert found == tuple((e,) for e in range(8))


@pytest.mark.parametrize("grouping", [one for one in EVERY if not isinstance(one, Random)], ids=repr)
@pytest.mark.parametrize("seed", range(5))
def test_renumbering_the_experts_renumbers_the_groups(grouping: Grouping, seed: int) -> None:
    scores, statistics = made_up(10, seed)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()  # new id -> old id
    new_of = {old: new for new, old in enumerate(order)}
    renumbered = Statistics(
        statistics.meta,
        {
            key: value[order][:, order] if value.dim() == 2 else value[order] if value.dim() else value
            for key, value in statistics.tensors.items()
        },
    )
    other = scores_of(scores.share[order], scores.tokens[order])
    keep, protected = best_of(scores, 1, 5), frozenset({scores.order[2]})
    found = grouping.group(scores, keep, statistics, protected, 1)
    again = grouping.group(
        other, tuple(sorted(new_of[e] for e in keep)), renumbered, frozenset({new_of[scores.order[2]]}), 1
    )
    assert sorted((new_of[one[0]], *sorted(new_of[e] for e in one[1:])) for one in found) == sorted(again)


@every_grouping
def test_a_protected_expert_that_is_not_kept_is_refused(grouping: Grouping) -> None:
    scores, statistics = made_up(6, 0)
    lost = scores.order[-1]
    with pytest.raises(ConfigError, match=rf"layer 0: protected experts \[{lost}\] are not among"):
        grouping.group(scores, best_of(scores, 1, 3), statistics, frozenset({lost}), 1)


def test_settings_come_from_plain_values_and_wrong_ones_are_named() -> None:
    assert find_grouping("ream", {"most": 3, "shares": "equal"}) == Ream(shares="equal", most=3)
    with pytest.raises(
        ConfigError, match=r"no grouping is named 'all'; there are mc_smoe, partial_preservation, random"
    ):
        find_grouping("all", {})
    with pytest.raises(ConfigError, match=r"grouping 'mc_smoe': there is no setting 'seed'; there are shares"):
        find_grouping("mc_smoe", {"seed": 1})
    with pytest.raises(ConfigError, match=r"grouping 'mc_smoe': setting 'shares': .*'frequency'"):
        find_grouping("mc_smoe", {"shares": "size"})
    with pytest.raises(ConfigError, match="shares 'size' is none of frequency, importance, equal"):
        McSmoe(shares="size")  # type: ignore[arg-type]


def alike(*origin: int, noise: float = 0.05, seed: int = 0) -> Tensor:
    """``[200, E]`` columns; those of one origin are the same but for noise."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(200, max(origin) + 1, generator=generator)[:, list(origin)]
    return columns + noise * torch.randn(columns.shape, generator=generator)


def outputs_of(columns: Tensor) -> Tensor:
    """``[E, 25, 8]`` outputs from ``[200, E]`` columns."""
    return columns.T.reshape(-1, 25, 8)


BEST_FIRST = torch.tensor([6.0, 5, 4, 3, 2, 1], dtype=torch.float64)
TOKENS = torch.tensor([10, 20, 30, 40, 50, 60])


@pytest.mark.parametrize(
    ("grouping", "keep", "expected"),
    [
        (McSmoe(), (0, 1, 2), ((0, 3), (1, 4), (2, 5))),
        (SubMoe(), (0, 1, 2), ((1, 0), (3, 2), (5, 4))),  # the more used of each pair is the dominant
    ],
    ids=repr,
)
def test_experts_that_are_alike_go_together(grouping: Grouping, keep: tuple[int, ...], expected: Groups) -> None:
    statistics = statistics_of(alike(0, 1, 2, 0, 1, 2), outputs_of(alike(0, 0, 1, 1, 2, 2)), TOKENS)
    assert grouping.group(scores_of(BEST_FIRST, TOKENS), keep, statistics, frozenset(), 1) == expected


def test_the_better_half_is_preserved_and_the_other_takes_in_the_rest() -> None:
    # by logits 4 is like 2 and 5 like 3, by outputs the other way round; both are also like 0, which stays as it is
    logits, outputs = alike(0, 1, 2, 3, 2, 3), alike(0, 1, 2, 3, 3, 2)
    logits[:, 4:] += 2 * logits[:, :1]
    statistics, scores = statistics_of(logits, outputs_of(outputs), TOKENS), scores_of(BEST_FIRST, TOKENS)

    def found(keep: tuple[int, ...], protected: tuple[int, ...] = (), similarity: Similarity = "outputs") -> Groups:
        grouping = PartialPreservation(similarity=similarity)
        return grouping.group(scores, keep, statistics, frozenset(protected), 1)

    assert found((0, 1, 2, 3)) == ((0,), (1,), (2, 5), (3, 4))
    assert found((0, 1, 2, 3), similarity="logits") == ((0,), (1,), (2, 4), (3, 5))
    assert [len(found((0, 1, 2))[0]), sum(map(len, found((0, 1, 2))))] == [1, 6]
    assert found((0, 1, 2, 3), protected=(3,))[3] == (3,)
    assert found((0, 1, 2, 3), protected=(3,))[0] == (0,)
    assert found((0, 1, 2, 3), protected=(1, 2, 3)) == ((0, 4, 5), (1,), (2,), (3,))


def test_ream_fills_groups_with_the_most_similar_first() -> None:
    # 3, 4 and 5 are all like 0, each less than the one before
    columns = alike(0, 1, 2, 0, 0, 0, noise=0)
    columns[:, 3:] += alike(0, 1, 2, noise=0, seed=1) * torch.tensor([0.2, 0.4, 0.6])
    statistics = statistics_of(columns, outputs_of(columns), TOKENS)
    scores = scores_of(BEST_FIRST, TOKENS)

    def sizes(most: int | None) -> list[int]:
        return [len(one) for one in Ream(most=most).group(scores, (0, 1, 2), statistics, frozenset(), 1)]

    assert sizes(4) == [4, 1, 1]
    assert Ream(most=2).group(scores, (0, 1, 2), statistics, frozenset(), 1)[0] == (0, 3)
    assert sorted(sizes(2)) == [2, 2, 2]
    assert Ream().group(scores, (0, 1, 2), statistics, frozenset(), 1)[0] == (0, 3, 4)
    with pytest.raises(ConfigError, match=r"groups of at most 2 have no room.*5 join 1, so set most to 6"):
        Ream(most=2).group(scores, (0,), statistics, frozenset(), 1)
    with pytest.raises(ConfigError, match="most is how many members"):
        Ream(most=1)


def test_random_groups_depend_on_the_seed_only() -> None:
    scores, statistics = made_up(12, 0)
    other, also = made_up(12, 1)
    keep = (1, 4, 7)
    first = Random().group(scores, keep, statistics, frozenset(), 1)
    again = LayerScores(0, other.share, scores.order, other.tokens)
    assert first == Random().group(again, keep, also, frozenset(), 1)
    assert first != Random(seed=1).group(scores, keep, statistics, frozenset(), 1)


@given(st.integers(2, 20), st.integers(0, 1 << 16), st.data())
@settings(max_examples=80, deadline=None)
def test_every_point_is_in_the_cluster_of_its_nearest_centroid(n: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    points = torch.nn.functional.normalize(
        torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    labels = kernel_kmeans(points @ points.T, k)
    assert sorted(set(labels.tolist())) == list(range(k))
    centroids = torch.stack([points[labels == one].mean(0) for one in range(k)])
    distances = torch.cdist(points, centroids)
    assert (distances[torch.arange(n), labels] <= distances.amin(1) + 1e-6).all()


def test_identical_points_leave_no_cluster_empty() -> None:
    labels = kernel_kmeans(torch.ones(6, 6, dtype=torch.float64), 4)
    assert sorted(set(labels.tolist())) == [0, 1, 2, 3]


def test_shares_are_by_use_by_worth_or_equal() -> None:
    scores = LayerScores(0, torch.tensor([0.5, 0.25, 0.25, 0.0]), (0, 1, 2, 3), torch.tensor([10, 30, 0, 0]))
    assert group_shares(scores, (0, 1), "frequency") == (0.25, 0.75)
    assert group_shares(scores, (0, 1), "importance") == pytest.approx((2 / 3, 1 / 3))
    assert group_shares(scores, (0, 1, 3), "equal") == pytest.approx((1 / 3,) * 3)
    assert group_shares(scores, (2, 3), "frequency") == (0.5, 0.5)
    assert group_shares(scores, (1, 2), "frequency") == (1.0, 0.0)
