"""Importance scores: what every one of them must hold to, and known values."""

from __future__ import annotations

import pytest
import torch
from shrinking import batches, made_up_statistics

from collegium.catalog import get
from collegium.compress.collectors import OutputNorms
from collegium.compress.importance import Importance, advise, find_importance, importances
from collegium.errors import ConfigError
from collegium.measure.collect import collect
from collegium.measure.statistics import Statistics
from tiny import tiny_model

EVERY = importances()
MEASURED = [one for one in EVERY if one.needs]


def permuted(statistics: Statistics, order: torch.Tensor) -> Statistics:
    """The statistics of the same model with its experts renumbered."""
    axis = {
        entry.name: int(entry.by_domain) for entry in statistics.meta.statistics if entry.axes[:1] == ("E",)
    }  # fmt: skip
    tensors = {
        (layer, name): tensor.index_select(axis[name], order) if name in axis else tensor
        for (layer, name), tensor in statistics.tensors.items()
    }
    return Statistics(statistics.meta, tensors)


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
@pytest.mark.parametrize("domain", [None, "prose"])
def test_scores_are_finite_one_for_each_expert(one: Importance, domain: str | None) -> None:
    statistics = made_up_statistics()
    if domain is not None and one.mixed(statistics):
        with pytest.raises(ConfigError, match=f"{one.mixed(statistics)[0]} is kept over all of them.*'pooled'"):
            one(statistics, 1, domain)
        return
    scores = one(statistics, 1, domain)
    assert scores.shape == (8,)
    assert scores.dtype == torch.float64
    assert scores.isfinite().all()
    assert len(scores.unique()) > 1
    assert get("importance", one.name) is one.function


@pytest.mark.parametrize("one", MEASURED, ids=lambda one: one.name)
def test_renumbering_the_experts_renumbers_the_scores(one: Importance) -> None:
    statistics, order = made_up_statistics(), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    domain = None if one.mixed(statistics) else "code"
    assert one(permuted(statistics, order), 2, domain).equal(one(statistics, 2, domain)[order])


@pytest.mark.parametrize("one", MEASURED, ids=lambda one: one.name)
def test_experts_that_no_token_reached_score_lowest(one: Importance) -> None:
    # negative logits, and probability for experts that are never chosen
    values = {"z_topk_sum": torch.linspace(-8, -1, 8), "p_sum": torch.full((8,), 5.0)}
    statistics = made_up_statistics(untouched=[2, 5], values=values)
    for layer in statistics.layers:
        statistics.tensors[layer, "p_sum"][:, [2, 5]] = 100
    scores = one(statistics, 0)
    assert (scores[[2, 5]] <= scores.min()).all()
    if one.name != "tcess":
        assert (scores[[0, 1, 3, 4, 6, 7]] > scores[2]).all()


@pytest.mark.parametrize("one", MEASURED, ids=lambda one: one.name)
def test_a_missing_statistic_is_named_with_what_there_is(one: Importance) -> None:
    bare = collect(tiny_model("qwen3_moe"), batches(1), [], domains=("a", "b"), name="tiny")
    lacking = one.missing(bare)
    assert lacking == [need for need in one.needs if need not in ("n", "n_tokens")]
    if lacking:
        with pytest.raises(
            ConfigError, match=rf"{one.name}' needs {lacking[0]}.*choose one of frequency, mc_smoe, random, z_code"
        ):
            one(bare, 0)
    else:
        assert one(bare, 0).sum() > 0


def test_an_unknown_setting_is_refused() -> None:
    assert find_importance("random").settings == {"seed": 0}
    with pytest.raises(ConfigError, match="no setting 'seed'; it has none"):
        find_importance("reap")(made_up_statistics(), 0, seed=1)
    with pytest.raises(ConfigError, match=r"no importance is named 'magic'; there are .*reap"):
        find_importance("magic")


def test_random_differs_by_seed_and_layer_and_not_by_statistics() -> None:
    random, statistics = find_importance("random"), made_up_statistics()
    assert random(statistics, 0).equal(random(made_up_statistics(seed=5), 0, "code"))
    assert not random(statistics, 0).equal(random(statistics, 1))
    assert not random(statistics, 0).equal(random(statistics, 0, seed=1))


def test_sums_and_means() -> None:
    values = {
        "n": [[100, 10, 1], [100, 0, 1]],
        "ean_sum": [[200.0, 40, 6], [0, 0, 2]],
        "ean_sq_sum": [[400.0, 160, 36], [0, 0, 4]],
        "w_ean_sum": [[100.0, 30, 6], [0, 0, 2]],
        "w_sum": [[50.0, 8, 1], [50, 0, 1]],
        "easy_sum": [[1.0, 2, 3], [0, 0, 1]],
        "p_sum": [[300.0, 100, 10], [300, 100, 10]],
        "z_topk_sum": [[-200.0, 10, 20], [0, 0, 0]],
        "w_share_sum": [[40.0, 6, 1], [40, 0, 1]],
        "loo_mse": [[20.0, 4, 1], [20, 0, 1]],
        "down_max": [5.0, 7, 3],
        "g2": [[1.0, 2, 3], [0, 0, 1]],
        "ballots": [[60, 35, 5], [35, 50, 15], [5, 15, 80]],
    }
    statistics = made_up_statistics(1, 3, values=values)
    expected = {
        "frequency": [200, 10, 2],
        "weighted_frequency": [100, 8, 2],
        "reap": [0.5, 3, 4],
        "weighted_ean_sum": [100, 30, 8],
        "ean_sum": [200, 40, 8],
        "man": [1, 4, 4],
        "msan": [2, 16, 20],
        "easy_ep": [1, 2, 4],
        "router_probability": [0.3, 0.1, 0.01],
        "tcess": [-0.1, 0.005, 0.01],
        "z_code": [0.1, 0.005, 0.001],
        "mc_smoe": [200 / 212, 10 / 212, 2 / 212],
        "dern": [0.04, 0.003, 0.001],
        "leave_one_out": [0.02, 0.002, 0.001],
        "max_activations": [5, 7, 3],
        "gradient_utility": [1, 2, 4],
        "ranked_choice": [3, 2, 1],
    }
    assert {one.name for one in MEASURED} == expected.keys()
    for name, scores in expected.items():
        assert find_importance(name)(statistics, 0).tolist() == pytest.approx(scores), name
    assert find_importance("reap")(statistics, 0, "code").tolist() == [1, 3, 6]
    assert find_importance("reap")(statistics, 0, "prose").tolist() == [0, 0, 2]


def test_reap_of_a_model_ranks_an_expert_that_was_made_louder_first() -> None:
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[3] *= 50
    statistics = collect(model, batches(), [OutputNorms()], domains=("a", "b"), name="tiny")
    assert find_importance("reap")(statistics, 0).argmax() == 3
    assert find_importance("man")(statistics, 0).argmax() == 3


def test_a_score_of_one_domain_is_that_of_all_where_there_is_but_one() -> None:
    statistics = made_up_statistics(domains=("all",))
    one = find_importance("max_activations")
    assert one(statistics, 0, "all").equal(one(statistics, 0))


def test_votes_of_those_that_go_are_handed_on() -> None:
    # 35 tokens rank 0, 1, 2; 33 rank 1, 0, 2; 32 rank 2, 1, 0: without 2 most would choose 1
    ballots = [[35, 33, 32], [33, 67, 0], [32, 0, 68]]
    statistics = made_up_statistics(1, 3, top_k=1, domains=("all",), values={"ballots": ballots})
    assert find_importance("ranked_choice")(statistics, 0).tolist() == [2, 3, 1]


def test_everyone_is_ranked_once() -> None:
    for top_k in (1, 3, 8):
        scores = find_importance("ranked_choice")(made_up_statistics(top_k=top_k), 0)
        assert sorted(scores.tolist()) == list(range(1, 9))


def test_sums_are_advised_for_uneven_load_and_means_for_even() -> None:
    even = advise(made_up_statistics(2, 4, values={"n": [[100, 100, 100, 100], [50, 50, 50, 50]]}))
    assert (even.prefer, even.mean_variation, even.specific) == ("means", 0, 0)
    uneven = advise(made_up_statistics(2, 4, values={"n": [[400, 0, 40, 0], [0, 80, 10, 0]]}))
    assert uneven.prefer == "sums"
    # tokens are 400, 80, 50, 0
    assert uneven.variation == pytest.approx({0: 1.185, 1: 1.185}, abs=1e-3)
    assert uneven.specific == pytest.approx(2 / 3)  # of those with tokens; the third has 40 of 440 and 10 of 90
    assert "1.19 (1.19 to 1.19)" in uneven.text
    assert "67% of the experts serve mostly one of the 2 domains" in uneven.text
    assert advise(made_up_statistics(domains=("all",))).specific is None
