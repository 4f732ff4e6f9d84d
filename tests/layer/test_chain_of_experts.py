"""A layer that routes several times: what it computes, counts and learns; saved, tapped and refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from collegium import models
from collegium.balance import BalanceConfig, load_balancing_loss, router_z_loss
from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.layer import MoE, after_step, balance_losses, link_layers, moe_layers, use_context
from collegium.models import MoEConfig, export, install
from collegium.models.checkpoint import open_checkpoint
from collegium.models.summary import summarize
from collegium.rng import generator
from collegium.routing import Router, Routing, RoutingContext, router_from
from collegium.routing.parts import Scores, Transform
from collegium.sites import GateInputs, Recorder, SwitchOff, sites, tap
from collegium.train.build import count_parameters
from collegium.train.optim import build_optimizer
from collegium.train.recipe import OptimSpec
from tiny import tiny_inputs, tiny_model

D, F, E, K, C = 16, 24, 8, 2, 3
PLAIN = {"num_experts": E, "num_experts_per_tok": 4, "moe_intermediate_size": 16}


def layer(seed: int = 0, iterations: int = C, **settings) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(D, F, E, K, **{"balance": BalanceConfig(), "iterations": iterations, **settings})
    moe.reset_parameters(0.3)
    return moe.train()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*(shape or (2, 5, D)), generator=torch.Generator().manual_seed(seed))


def by_hand(moe: MoE, x: Tensor, residual: bool) -> Tensor:
    """The formula of the paper, expert by expert."""
    x = x.reshape(-1, D)
    for gate in moe.gates:
        p = (x @ gate.weight.T).softmax(-1)
        weight, index = p.topk(K, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e in range(E):
            g, up = (x @ moe.experts.gate_up_proj[e].T).chunk(2, -1)
            given = (nn.functional.silu(g) * up) @ moe.experts.down_proj[e].T
            y = y + (weight * (index == e)).sum(-1, keepdim=True) * given
        if moe.shared_experts is not None:
            y = y + moe.shared_experts(x)
        x = x + y if residual else y
    return x


def near(one: Tensor, other: Tensor) -> None:
    """Equal but for rounding, on the scale of the whole tensor: iterations multiply what they are given."""
    assert (one - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shared", [0, 12])
def test_value_and_gradients_are_those_of_the_formula(residual: bool, shared: int) -> None:
    moe = layer(inner_residual=residual, shared=shared, balance=None)
    x = tokens().requires_grad_()
    y = moe(x)
    expected = by_hand(moe, x, residual).view_as(x)
    near(y, expected)
    wrt = [x, *moe.parameters()]
    ours, theirs = (torch.autograd.grad(one.square().mean(), wrt) for one in (y, expected))
    for one, other in zip(ours, theirs, strict=True):
        near(one, other)
    assert all(gate.weight.grad is None for gate in moe.gates)
    assert all(one.abs().sum() > 0 for one in ours)


def test_one_iteration_is_the_layer_as_it_was() -> None:
    moe = layer(iterations=1, shared=8)
    x = tokens()
    flat = x.reshape(-1, D)
    routing = moe.gate(flat, RoutingContext(training=True))
    plain = moe.experts(flat, routing) + moe.shared_experts(flat)
    assert torch.equal(moe(x), plain.view_as(x))
    assert not moe.inner_residual
    assert not any("later" in name for name in moe.state_dict())
    assert len(moe.routings) == 1
    assert moe.routings[0] is moe.last
    # with the residual of the paper it is the plain layer and what came in
    again = layer(iterations=1, shared=8, inner_residual=True)
    assert torch.equal(again(x), x + plain.view_as(x))


def test_present_random_keys_do_not_change_and_iterations_draw_their_own() -> None:
    context = RoutingContext(layer=3, step=5, seed=7, micro_batch=2)
    draws = [
        torch.rand(4, generator=one.generator("jitter"))
        for one in (context, replace(context, iteration=1), replace(context, draw=1), replace(context, iteration=2))
    ]
    # the key from before there were iterations
    assert torch.equal(draws[0], torch.rand(4, generator=generator(7, 5, 2, 3, "jitter")))
    assert len({tuple(one.tolist()) for one in draws}) == 4


def random_layer(**settings) -> MoE:
    gates = [router_from({"select": {"random_expert": {"unit": "token"}}}, D, E, K) for _ in range(C)]
    return layer(router=gates, **settings)


def test_experts_by_chance_differ_between_iterations() -> None:
    moe = random_layer()
    context = RoutingContext(step=1, position=torch.arange(10))
    moe(tokens(), context)
    chosen = [one.expert for one in moe.routings]
    assert not torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[1], chosen[2])
    seen: list[Tensor] = []
    moe.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1].expert))
    moe.eval()(tokens(), context)
    assert len({tuple(one.tolist()) for one in seen}) == C


def test_counts_add_up_and_losses_are_means_over_iterations() -> None:
    balance = BalanceConfig(load_balancing=0.3, z_loss=0.2, scope="micro_batch", losses=("routing_entropy",))
    moe = layer(balance=balance)
    moe(tokens())
    assert moe.balance.stats.sync().sum() == 10 * K * C
    assert torch.equal(moe.balance.stats.sync(), sum(one.counts() for one in moe.routings))
    losses = moe.losses()
    assert set(losses) == {"load_balancing", "z_loss", "routing_entropy"}
    lbl = [load_balancing_loss(one) for one in moe.routings]
    torch.testing.assert_close(losses["load_balancing"], 0.3 * sum(lbl) / C)
    torch.testing.assert_close(losses["z_loss"], 0.2 * sum(router_z_loss(one) for one in moe.routings) / C)
    sum(balance_losses(moe).values()).backward()
    assert all(gate.weight.grad.abs().sum() > 0 for gate in moe.gates)
    after_step(moe, 0)
    assert moe.balance.stats.sync().sum() == 0


def test_the_bias_controller_moves_all_routers_by_the_pooled_counts() -> None:
    balance = BalanceConfig(load_balancing=0, bias_update_rate=0.1)
    moe = layer(balance=balance, router={"score": "sigmoid", "selection_bias": True})
    moe(tokens())
    counts = moe.balance.stats.sync()
    after_step(moe, 0)
    right = 0.1 * (counts.float().mean() - counts).sign()
    for gate in moe.gates:
        torch.testing.assert_close(gate.e_score_correction_bias, right)


def test_the_first_iteration_decides_what_the_second_one_sees() -> None:
    moe = layer().eval()
    x = tokens()
    seen: list[Routing] = []
    moe.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    moe(x)
    with torch.no_grad():
        moe.gate.weight.copy_(moe.gate.weight.roll(1, 0))
    moe(x)
    assert not torch.equal(seen[1].expert, seen[C + 1].expert)


@pytest.mark.parametrize("make", [layer, random_layer])
def test_recomputation_replays_the_same_choices_and_counts_once(make) -> None:
    grads = []
    for recompute in (False, True):
        moe = make(shared=8)
        seen: list[tuple[int, ...]] = []
        moe.experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(tuple(args[1].expert.tolist())))
        x = tokens()
        with use_context(moe, RoutingContext(step=4, seed=2, micro_batch=1)):
            y = checkpoint(moe, x, use_reentrant=False) if recompute else moe(x)
            (y.square().mean() + sum(balance_losses(moe).values())).backward()
        assert len(seen) == C * (2 if recompute else 1)
        assert seen[:C] == seen[-C:]
        assert moe.balance.stats.sync().sum() == 10 * K * C
        grads.append([p.grad for p in moe.parameters()])
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_routers_that_look_back_see_the_iteration_before_and_the_layer_before() -> None:
    def make() -> MoE:
        gates = [router_from({"transforms": ["gating_residual"]}, D, E, K) for _ in range(2)]
        return layer(iterations=2, router=gates)

    first, second = make(), make()
    model = nn.Sequential(first, second).train()
    link_layers(model)
    seen: list[Routing | None] = []
    for moe in model:
        for gate in moe.gates:
            gate.register_forward_pre_hook(lambda _, args: seen.append(args[1].previous))
    model(tokens())
    assert seen == [None, first.routings[0], first.routings[1], second.routings[0]]
    assert all(one.logits is not None for one in seen[1:])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"iterations": 0}, "iterations is 0"),
        ({"router": Router(D, E, K)}, "iterations is 3, but there are 1 routers"),
        ({"iterations": 2, "router": [Router(D, E, K), Router(D, 4, K)]}, "2 of 4 experts"),
        ({"balance": BalanceConfig(bias_update_rate=0.1)}, "selection_bias"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        layer(**settings)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"iterations": 0}, "iterations"),
        ({"router": {"chain_of_experts": {"iterations": 3}}}, "4 experts of a token .* 3 iterations"),
        ({"router": {"chain_of_experts": {"iteration": 2}}}, "did you mean 'iterations'"),
        ({"router": {"chain_of_experts": 0}}, "0 iterations"),
    ],
)
def test_configs_that_cannot_be(more: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MoEConfig.model_validate({**PLAIN, **more})


@dataclass(frozen=True)
class Remembers(Transform):
    """Keeps something of a sequence."""

    remembers = True

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        return scores


@dataclass(frozen=True)
class Averages(Transform):
    """Averages as the attention does."""

    needs_attention = True

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        return scores


def test_parts_that_act_once_a_forward_are_refused() -> None:
    for part in (Remembers(), Averages()):
        gates = [Router(D, E, K, transforms=[part]) for _ in range(C)]
        with pytest.raises(ConfigError, match=f"{type(part).__name__.lower()} acts once a forward"):
            layer(router=gates)
        layer(router=gates[:1], iterations=1)


def chain(**settings):
    model = tiny_model("qwen3")
    config = MoEConfig.model_validate({**PLAIN, "router": "chain_of_experts", **settings})
    install(model, config)
    for moe in moe_layers(model):
        for gate in moe.gates:
            nn.init.normal_(gate.weight, std=0.5)
    return model.eval()


def test_the_system_keeps_the_computation_of_the_plain_layer() -> None:
    config = MoEConfig.model_validate({**PLAIN, "router": "chain_of_experts"})
    assert (config.iterations, config.slots, config.inner_residual) == (2, 2, True)
    assert MoEConfig.model_validate(config.model_dump(mode="json")) == config
    plain = tiny_model("qwen3")
    install(plain, MoEConfig.model_validate(PLAIN))
    model = chain()
    ours, theirs = count_parameters(model), count_parameters(plain)
    routers = sum(moe.gate.weight.numel() for moe in moe_layers(plain))
    assert ours.active - theirs.active == ours.total - theirs.total == routers
    # a token cannot use more experts than there are
    many = tiny_model("qwen3")
    install(many, MoEConfig.model_validate({**PLAIN, "iterations": 3}))
    found = count_parameters(many)
    assert found.active == found.total


def test_a_model_is_saved_loaded_counted_and_writes_on_with_a_cache(tmp_path: Path) -> None:
    model = chain()
    ids = tiny_inputs(model, batch=1, length=12)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        past = model(input_ids=ids[:, :-2], use_cache=True)
        step = model(input_ids=ids[:, -2:-1], past_key_values=past.past_key_values, use_cache=True)
    torch.testing.assert_close(step.logits[:, -1], whole[:, -2], rtol=1e-4, atol=1e-5)
    models.save(model, tmp_path / "model")
    again = models.load(tmp_path / "model")
    assert [len(moe.gates) for moe in moe_layers(again)] == [2, 2]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, whole)
    found = summarize(open_checkpoint(tmp_path / "model"))
    size = count_parameters(model)
    assert (found.parameters, found.active_parameters) == (size.total, size.active)
    gates = [gate.weight.numel() for moe in moe_layers(model) for gate in moe.gates]
    assert found.parts["router"][0] == sum(gates)
    with pytest.raises(ConfigError, match="iterations = 2"):
        export(model, "qwen3_moe")


def test_no_router_is_decayed() -> None:
    model = chain()
    plain = {id(p) for p in build_optimizer(model, OptimSpec()).param_groups[1]["params"]}
    assert all(id(gate.weight) in plain for moe in moe_layers(model) for gate in moe.gates)


@torch.no_grad()
def test_a_tap_sees_every_iteration_where_it_says_that_it_can() -> None:
    model = chain()
    inputs = tiny_inputs(model)
    whole = model(**inputs).logits
    recorder, gates = Recorder(), GateInputs()
    with tap(model, recorder, gates, logits=True, iterated=True) as found:
        assert torch.equal(model(**inputs).logits, whole)
    assert [site.iterations for site in found] == [2, 2]
    for site in found:
        first, second = recorder.routings[site.path]
        assert not torch.equal(first.expert, second.expert)
        for gate, x, routing in zip(site.gates, gates.inputs[site.path], (first, second), strict=True):
            torch.testing.assert_close(gate.logits(x), routing.logits)
            assert not gate.keep_logits
    off = {0: [int(recorder.routings[found[0].path][1].expert[0])]}
    with tap(model, SwitchOff(off), recorder, iterated=True):
        changed = model(**inputs).logits
    assert not torch.equal(changed, whole)
    assert all(not (one.expert == off[0][0]).any() for one in recorder.routings[found[0].path][2:])
    assert torch.equal(model(**inputs).logits, whole)


def test_what_knows_one_routing_of_a_layer_refuses() -> None:
    model = chain()
    for call in (lambda: sites(model), lambda: tap(model, Recorder()).__enter__()):
        with pytest.raises(UnsupportedFamilyError, match="routes 2 times in a forward"):
            call()
    assert len(sites(model, iterated=True)) == 2
