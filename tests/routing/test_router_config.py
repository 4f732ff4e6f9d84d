"""Routers from plain data: what is understood, and what is refused in words."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

from collegium.errors import ConfigError
from collegium.models import MoEConfig
from collegium.routing import RoutingContext, router_from
from collegium.routing.scores import Sigmoid
from collegium.routing.transforms import GroupLimit, SelectionBias


def test_the_example_of_the_docs() -> None:
    router = router_from(
        {
            "score": "sigmoid",
            "transforms": ["bias", {"group_limit": {"groups": 8, "keep": 4}}],
            "select": {"top_k": 8},
            "weigh": {"normalise": True, "scale": 2.5},
        },
        32,
        64,
        2,
    )
    assert (router.top_k, router.routed_scaling_factor) == (8, 2.5)
    assert router.score == Sigmoid()
    assert router.transforms == (SelectionBias(), GroupLimit(8, 4))
    routing = router(torch.randn(5, 32))
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.full((5,), 2.5))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"scoer": "sigmoid"}, "did you mean 'score'"),
        ({"score": "sigmoit"}, "router.score: no score is named 'sigmoit'; did you mean 'sigmoid'"),
        ({"transforms": ["biass"]}, "did you mean 'bias'"),
        ({"transforms": "bias"}, "a list of parts"),
        ({"transforms": [{"group_limit": {"group": 8, "keep": 4}}]}, "no setting 'group'; did you mean 'groups'"),
        ({"transforms": [{"group_limit": {"groups": 3, "keep": 2}}]}, "does not divide 8 experts"),
        ({"transforms": [{"group_limit": {"groups": "many", "keep": 2}}]}, "'groups'"),
        ({"select": {"top_k": 9}}, "top_k is 9 but the layer has 8 experts"),
        ({"select": {"top_p": 0}}, "above 0 and at most 1"),
        ({"select": {"top_p": 1.5}}, "above 0 and at most 1"),
        ({"select": {"grouped_top_k": 3}}, "does not divide 8 experts"),
        ({"select": ["top_k"]}, "router.select: write a name"),
        ({"select": {"top_k": 2, "top_p": 0.4}}, "router.select: write a name"),
        ({"weigh": {"scale": 0}}, "above 0"),
        ({"weigh": {"normalise": True, "softmax_selected": {}}}, "normalise is not for"),
        ({"weigh": {"normalize": True}}, "did you mean"),
        ({"capacity": {"position": 0}}, "above 0, not 0"),
        ({"capacity": {"position": {"eval_capacity_factor": -1}}}, "above 0, not -1"),
        ({"transforms": [{"selective_sinkhorn": 2.0}]}, "from 0 to 1"),
        ({"transforms": ["bias", "gating_residual"]}, "must come before SelectionBias"),
        ({"transforms": ["gating_residual", "gating_residual"]}, "only once"),
    ],
    ids=lambda one: str(one),
)
def test_what_is_wrong_is_refused_in_words(said: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        router_from(said, 16, 8, 2)
    assert words in str(error.value)


PLAIN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def test_a_system_becomes_parts_that_are_saved_as_they_are() -> None:
    config = MoEConfig.model_validate({**PLAIN, "router": {"ssr": {"probability": 0.5}}})
    assert config.router is not None
    assert config.router["transforms"] == [
        {"selective_sinkhorn": {"probability": 0.5, "xi": 0.05, "cost": "probs", "noise": 0.0}}
    ]
    assert config.balance.load_balancing == 0
    assert MoEConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"router": "ssrr"}, "did you mean 'ssr'"),
        ({"router": {"ssr": {"probabilty": 1}}}, "did you mean 'probability'"),
        ({"router": {"score": "softmax"}, "scoring_func": "sigmoid"}, "leave out scoring_func"),
        ({"router": {"deepseek_moe": {"segments": 3}}}, "multiple of 3"),
        ({"router": {"moge": 3}}, "does not divide 8 experts"),
        ({"router": {"thor": "sentence"}}, r"router\.thor: setting 'inference': .*'token', 'sequence' or 'ensemble'"),
        ({"num_experts": 9, "router": "thor"}, "thor: 9 experts cannot be joined by 2"),
        ({"zero_experts": ["nothing"], "router": {}}, "zero"),
        ({"balance": {"losses": ["entropy"]}}, "routing_entropy"),
        ({"num_experts_per_tok": 9}, "9"),
    ],
)
def test_configs_that_cannot_be(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MoEConfig.model_validate({**PLAIN, **more})


def test_what_a_system_undoes_is_named() -> None:
    said = {**PLAIN, "balance": {"load_balancing": 0.05}}
    with pytest.warns(UserWarning, match="router 'switch' says balance itself"):
        config = MoEConfig.model_validate({**said, "router": "switch"})
    assert config.balance.load_balancing == 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoEConfig.model_validate({**PLAIN, "router": "switch"})


def test_systems_keep_the_computation_of_the_plain_layer() -> None:
    for name, active in {"deepseek_moe": 2 * 16, "switch": 2 * 16, "moge": 2 * 16, "adamoe": 4 * 16}.items():
        config = MoEConfig.model_validate({**PLAIN, "router": name})
        shared = config.n_shared_experts
        assert (config.slots + shared) * config.moe_intermediate_size == active, name


@pytest.mark.parametrize("select", ["random_expert", {"top_p": 0.5}])
def test_even_weights_are_one_over_the_number_of_a_tokens_experts(select: Any) -> None:
    routing = router_from({"select": select, "weigh": "even"}, 16, 8, 3)(torch.randn(20, 16) * 50)
    index, weight = routing.to_topk()
    used = index < 8
    torch.testing.assert_close(weight, used / used.sum(-1, keepdim=True))
    assert not weight.requires_grad
    assert (select == "random_expert") == bool(used.all())


@pytest.mark.parametrize("training", [True, False])
def test_experts_by_chance_are_not_forbidden_ones(training: bool) -> None:
    said = {"transforms": [{"group_limit": {"groups": 4, "keep": 1}}], "select": "random_expert"}
    router = router_from(said, 16, 8, 1)
    x, context = torch.randn(50, 16) * 50, RoutingContext(training=training, position=torch.arange(50))
    best = router.logits(x).softmax(-1).view(50, 4, 2).topk(2).values.sum(-1).argmax(-1)
    assert torch.equal(router(x, context).expert // 2, best)


def test_parts_are_understood_where_nothing_was_imported_before() -> None:
    # a config refuses parts that do not fit on the meta device, where the catalogue may import all rooms
    script = f"from collegium.models import MoEConfig; MoEConfig(**{PLAIN}, router={{'select': 'random_expert'}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
