"""`Router` as a torch module, and `build_router`."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from collegium.errors import ConfigError
from collegium.routing import Router, RoutingContext, build_router
from collegium.routing.parts import Scores, Selection
from collegium.routing.scores import Sigmoid
from collegium.routing.selection import SparseMixer, SparseMixerWeights
from collegium.routing.transforms import GroupLimit, LogitSelection, SelectionBias
from collegium.routing.weighing import Raw, Renormalised, SoftmaxSelected

T, E, D = 30, 8, 16


def deepseek_like() -> Router:
    router = build_router(
        D, E, 2, score="sigmoid", routed_scaling_factor=2.5, n_group=4, topk_group=2, selection_bias=True, bias=True
    )
    torch.manual_seed(0)
    router.reset_parameters(std=0.5)
    router.e_score_correction_bias.normal_(std=0.3)
    torch.nn.init.normal_(router.bias)
    return router


def test_state_dict_names_and_round_trip():
    router = deepseek_like()
    assert list(router.state_dict()) == ["weight", "bias", "e_score_correction_bias"]
    assert [name for name, _ in router.named_parameters()] == ["weight", "bias"]
    other = deepseek_like()
    other.reset_parameters()
    other.load_state_dict(router.state_dict())
    x = torch.randn(T, D)
    assert torch.equal(other(x).expert, router(x).expert)
    assert list(build_router(D, E, 2).state_dict()) == ["weight"]


def test_deepcopy_is_independent():
    router = deepseek_like()
    router.keep_logits = True
    twin = copy.deepcopy(router)
    x = torch.randn(T, D)
    assert torch.equal(twin(x).expert, router(x).expert)
    twin.e_score_correction_bias.fill_(9.0)
    assert not (router.e_score_correction_bias == 9.0).any()
    assert twin.keep_logits
    assert twin.parts == router.parts


@pytest.mark.parametrize(
    "convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu", torch.float64)]
)
def test_correction_bias_stays_exactly_float32(convert):
    router = deepseek_like()
    exact = router.e_score_correction_bias.clone()
    holder = torch.nn.Sequential(router)
    convert(holder)
    assert router.weight.dtype != torch.float32
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, exact)
    assert dict(holder.named_buffers())["0.e_score_correction_bias"] is router.e_score_correction_bias
    routing = router(torch.randn(T, D, dtype=router.weight.dtype))
    assert routing.weight.dtype == routing.probs.dtype == torch.float32


def test_meta_and_back():
    with torch.device("meta"):
        router = Router(D, E, 2, transforms=[SelectionBias()])
    assert router(torch.empty(T, D, device="meta")).weight.device.type == "meta"
    router.to(torch.bfloat16).to_empty(device="cpu")
    router.reset_parameters()
    assert router.e_score_correction_bias.dtype == torch.float32
    assert router.weight.dtype == torch.bfloat16
    assert router(torch.randn(T, D)).slots == 2


def test_autocast_does_not_reach_the_router():
    router, x = deepseek_like(), torch.randn(T, D)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = router(x)
        family = Router(D, E, 2, float32_logits=False)(x.bfloat16())
    assert torch.equal(mixed.weight, plain.weight)
    assert family.weight.dtype == torch.float32


def test_checkpointing_replays_random_choices():
    router = Router(D, E, 2, selection=SparseMixer(0.5), weigh=SparseMixerWeights(0.5), transforms=[LogitSelection()])
    router.reset_parameters(std=0.3)
    x = torch.randn(200, D)
    context = RoutingContext(training=True, seed=4)
    seen = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        routing = router(x, context)
        seen.append(routing.expert)
        return (routing.weight_TK * routing.index_TK).sum(-1)

    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        router.zero_grad()
        run(x.requires_grad_()).sum().backward()
        grads.append(router.weight.grad.clone())
    assert len(seen) == 3
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(router(x).expert, seen[0]), "without a context nothing is drawn"


def test_logits_are_kept_only_when_asked():
    router, x = deepseek_like(), torch.randn(T, D)
    assert router(x).logits is None
    assert router(x).selection is None
    router.keep_logits = True
    routing = router(x)
    torch.testing.assert_close(routing.logits, x @ router.weight.T + router.bias)
    torch.testing.assert_close(routing.probs, routing.logits.sigmoid())
    assert (routing.selection == -torch.inf).sum() == T * E / 2


def test_valid_travels_with_the_routing():
    valid = torch.arange(T) < 10
    routing = build_router(D, E, 2)(torch.randn(T, D), RoutingContext(valid=valid))
    assert routing.counts().sum() == 20


@dataclass(frozen=True)
class Above(Selection):
    """Every expert whose selection score is above a threshold: some tokens get none, some many."""

    threshold: float = 0.7
    fixed = False

    def __call__(self, scores: Scores, top_k: int, context: RoutingContext) -> torch.Tensor:
        value, index = scores.selection.sort(-1, descending=True)
        return index.masked_fill(value <= self.threshold, scores.selection.shape[-1])


@pytest.mark.parametrize("weigh", [Raw(), Renormalised(), SoftmaxSelected()], ids=str)
def test_a_variable_number_of_experts(weigh):
    router = Router(D, E, 2, score=Sigmoid(), selection=Above(), weigh=weigh)
    router.reset_parameters(std=0.2)
    routing = router(torch.randn(T, D))
    wanted = routing.probs > 0.7
    assert wanted.any(-1).sum() < T, "some token must have no expert at all"
    assert torch.equal(routing.counts(), wanted.sum(0))
    index, weight = routing.to_topk()
    if not isinstance(weigh, Raw):
        torch.testing.assert_close(weight.sum(-1), wanted.any(-1).float())
    (routing.weight * torch.rand_like(routing.weight)).sum().backward()
    assert torch.isfinite(router.weight.grad).all()
    assert router.weight.grad.abs().sum() > 0
    assert (index < E).sum() == wanted.sum()


def test_no_tokens():
    routing = deepseek_like()(torch.empty(0, D))
    assert routing.num_tokens == 0
    assert routing.counts().tolist() == [0] * E


@pytest.mark.parametrize("shape", [(2, 3, D), (D,), (4, D + 1)])
def test_x_must_be_tokens_by_width(shape):
    with pytest.raises(ConfigError, match=rf"x \[tokens, {D}\], got"):
        build_router(D, E, 2)(torch.randn(shape))


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, ["Softmax", "TopK", "Renormalised"]),
        ({"norm_topk_prob": False}, ["Softmax", "TopK", "Raw"]),
        ({"softmax_selected": True, "bias": True}, ["Softmax", "LogitSelection", "TopK", "SoftmaxSelected"]),
        (
            {"score": "sigmoid", "selection_bias": True, "n_group": 4, "topk_group": 2},
            ["Sigmoid", "SelectionBias", "GroupLimit", "TopK", "Renormalised"],
        ),
        ({"n_group": 1, "topk_group": 1}, ["Softmax", "TopK", "Renormalised"]),
    ],
)
def test_build_router_from_plain_settings(settings, parts):
    router = build_router(D, E, 2, **settings)
    assert [type(part).__name__ for part in router.parts] == parts
    assert (router.bias is not None) == settings.get("bias", False)
    assert (router.e_score_correction_bias is not None) == settings.get("selection_bias", False)
    for part in parts:
        assert part in repr(router)


def test_scaling_factor_multiplies_weights_only():
    one, scaled = build_router(D, E, 3), build_router(D, E, 3, routed_scaling_factor=2.5)
    scaled.load_state_dict(one.state_dict())
    x = torch.randn(T, D)
    torch.testing.assert_close(scaled(x).weight, one(x).weight * 2.5)
    torch.testing.assert_close(scaled(x).weight_TK.sum(-1), torch.full((T,), 2.5))
    torch.testing.assert_close(scaled(x).probs, one(x).probs)


def test_build_router_refuses():
    with pytest.raises(ConfigError, match="n_group is 4 and topk_group is None"):
        build_router(D, E, 2, n_group=4)
    with pytest.raises(ConfigError, match="no score is named 'tanh'"):
        build_router(D, E, 2, score="tanh")
    with pytest.raises(ConfigError, match="top_k is 9"):
        build_router(D, E, 9)


def test_one_expert_with_normalised_weight_is_announced():
    with pytest.warns(UserWarning, match="gives the router no gradient"):
        build_router(D, E, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_router(D, E, 1, norm_topk_prob=False)


def test_group_limit_default_scores_are_biased_ones():
    """The bias acts before the groups are scored, so it can move a token to another group."""
    router = Router(D, E, 2, transforms=[SelectionBias(), GroupLimit(4, 1)])
    router.e_score_correction_bias[6:] = 5.0
    assert (router(torch.randn(T, D)).index_TK >= 6).all()
