"""`MoE`: what it computes, what it counts and when, its losses, and its use in any torch model."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import collegium.layer
from collegium.balance import BalanceConfig, load_balancing_loss, router_z_loss
from collegium.errors import ConfigError
from collegium.layer import MoE, SharedExperts, after_step, balance_losses, moe_layers, use_context
from collegium.routing.record import Routing, RoutingContext
from collegium.routing.router import Router, build_router

D = 16


def layer(seed: int = 0, **settings) -> MoE:
    torch.manual_seed(seed)
    settings = {"balance": BalanceConfig(), **settings}
    moe = MoE(D, 24, 4, 2, **settings)
    moe.reset_parameters(0.3)
    return moe


def test_the_example_in_the_docstring_runs() -> None:
    result = doctest.testmod(collegium.layer)
    assert result.attempted >= 10
    assert result.failed == 0


def test_output_is_the_weighted_sum_of_experts_plus_the_gated_shared_expert() -> None:
    moe = layer(shared=20, shared_gate=True).eval()
    x = torch.randn(2, 3, D)
    flat = x.reshape(-1, D)
    routing = moe.gate(flat)
    expected = []
    for t in range(6):
        y = torch.zeros(D)
        for e, w in zip(routing.index_TK[t], routing.weight_TK[t], strict=True):
            gate, up = (moe.experts.gate_up_proj[e] @ flat[t]).chunk(2)
            y = y + w * (moe.experts.down_proj[e] @ (nn.functional.silu(gate) * up))
        s = moe.shared_experts
        shared = s.down_proj(nn.functional.silu(s.gate_proj(flat[t])) * s.up_proj(flat[t]))
        expected.append(y + torch.sigmoid(moe.shared_expert_gate(flat[t])) * shared)
    torch.testing.assert_close(moe(x), torch.stack(expected).view(2, 3, D), rtol=1e-5, atol=1e-5)


def test_one_expert_is_a_dense_ffn() -> None:
    moe = MoE(D, 24, 1, 1, router={"norm_topk_prob": False}).eval()
    dense = SharedExperts(D, 24)
    with torch.no_grad():
        gate, up = moe.experts.gate_up_proj[0].chunk(2)
        dense.gate_proj.weight.copy_(gate)
        dense.up_proj.weight.copy_(up)
        dense.down_proj.weight.copy_(moe.experts.down_proj[0])
    x = torch.randn(5, D)
    torch.testing.assert_close(moe(x), dense(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(D,), (7, D), (2, 3, D), (0, D), (2, 2, 2, D)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    moe = layer().eval()
    x = torch.randn(shape)
    assert moe(x).shape == shape
    torch.testing.assert_close(moe(x).reshape(-1, D), moe(x.reshape(-1, D)), rtol=0, atol=0)


def test_experts_of_a_fake_router_and_fake_experts() -> None:
    class Doubles(nn.Module):
        def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
            return 2 * x

    moe = MoE.from_parts(build_router(D, 4, 2), Doubles(), layer_index=3)
    x = torch.randn(3, D)
    assert moe(x).equal(2 * x)
    assert moe.losses() == {}
    assert moe.last is not None


def test_last_and_counts_come_from_training_only() -> None:
    moe = layer()
    x = torch.randn(2, 5, D)
    moe.eval()(x)
    assert moe.last is None
    assert moe.balance.stats.sync().sum() == 0
    moe.train()(x)
    assert moe.balance.stats.sync().sum() == 20
    first = moe.last
    moe.eval()(x)
    assert moe.last is first


def test_micro_batches_add_up_and_a_step_starts_anew() -> None:
    moe = layer().train()
    for _ in range(3):
        moe(torch.randn(2, 5, D))
        balance_losses(moe)
    assert moe.balance.stats.sync().sum() == 60
    after_step(moe, 0)
    assert moe.balance.stats.sync().sum() == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputation_counts_once_and_gives_the_same_gradient(recompute: bool) -> None:
    moe = layer(balance=BalanceConfig(load_balancing=0.5, z_loss=0.1), shared=8).train()
    x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))
    y = checkpoint(moe, x, use_reentrant=False) if recompute else moe(x)
    (y.square().mean() + sum(balance_losses(moe).values())).backward()
    assert moe.balance.stats.sync().sum() == 20
    plain = layer(balance=BalanceConfig(load_balancing=0.5, z_loss=0.1), shared=8).train()
    (plain(x).square().mean() + sum(balance_losses(plain).values())).backward()
    for (name, ours), theirs in zip(moe.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, name=name: f"{name}: {m}")
    assert plain.gate.weight.grad.abs().max() > 0


def test_reentrant_recomputation_is_refused_where_it_would_train_nothing() -> None:
    moe = layer().train()
    checkpoint(moe, torch.randn(4, D, requires_grad=True), use_reentrant=True)
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        moe.losses()


def test_losses_before_a_training_forward_are_refused() -> None:
    moe = layer()
    moe.eval()(torch.randn(3, D))
    with pytest.raises(ConfigError, match="training mode"):
        balance_losses(moe)


def test_balance_losses_are_weighted_and_averaged_over_layers() -> None:
    balance = BalanceConfig(load_balancing=0.3, z_loss=0.2, scope="micro_batch")
    first, second, silent = layer(0, balance=balance), layer(1, balance=balance), layer(2, balance=None)
    model = nn.Sequential(first, second, silent).train()
    model(torch.randn(9, D))
    losses = balance_losses(model)
    lbl = [load_balancing_loss(moe.last) for moe in (first, second)]
    z = [router_z_loss(moe.last) for moe in (first, second)]
    assert set(losses) == {"load_balancing", "z_loss"}
    torch.testing.assert_close(losses["load_balancing"], 0.3 * sum(lbl) / 2)
    torch.testing.assert_close(losses["z_loss"], 0.2 * sum(z) / 2)
    assert moe_layers(model) == [first, second, silent]


def test_a_coefficient_of_zero_is_no_loss() -> None:
    moe = layer(balance=BalanceConfig(load_balancing=0)).train()
    moe(torch.randn(4, D))
    assert balance_losses(moe) == {}
    assert moe.balance.stats.sync().sum() == 8


def test_sequence_scope_takes_documents_else_rows() -> None:
    moe = layer(balance=BalanceConfig(load_balancing=1, scope="sequence")).train()
    x = torch.randn(2, 6, D)
    moe(x)
    rows = load_balancing_loss(moe.last, scope="sequence", sequence=torch.arange(2).repeat_interleave(6))
    torch.testing.assert_close(moe.losses()["load_balancing"], rows)
    document = torch.tensor([[4, 4, 4, 9, 9, 9], [9, 9, 9, 9, 5, 5]]).flatten()
    moe(x, RoutingContext(document=document))
    by_document = load_balancing_loss(moe.last, scope="sequence", sequence=document)
    torch.testing.assert_close(moe.losses()["load_balancing"], by_document)
    assert not torch.equal(rows, by_document)
    moe(x.flatten(0, 1))
    with pytest.raises(ConfigError, match="sequence"):
        moe.losses()


def test_padding_is_not_counted() -> None:
    moe = layer().train()
    valid = torch.arange(10) < 6
    moe(torch.randn(2, 5, D), RoutingContext(valid=valid))
    assert moe.balance.stats.sync().sum() == 12
    assert moe.balance.stats.tokens == 6


def test_a_context_reaches_layers_inside_a_model_and_is_taken_back() -> None:
    seen = []
    model = nn.Sequential(layer(layer_index=3), layer(layer_index=5)).train()
    for moe in model:
        moe.gate.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    context = RoutingContext(step=7, valid=torch.ones(4, dtype=torch.bool))
    with use_context(model, context):
        model(torch.randn(4, D))
    assert [(c.layer, c.step, c.training) for c in seen] == [(3, 7, True), (5, 7, True)]
    assert all(moe.context is None for moe in model)
    with pytest.raises(ConfigError, match="9 tokens"), use_context(model, context):
        model(torch.randn(9, D))


def test_the_bias_controller_acts_after_the_step_on_the_pooled_counts() -> None:
    balance = BalanceConfig(load_balancing=0, bias_update_rate=0.1)
    moe = layer(balance=balance, router={"score": "sigmoid", "selection_bias": True}).train()
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.e_score_correction_bias.copy_(torch.tensor([0.3, 0.2, 0.0, 0.0]))
    for _ in range(2):
        moe(torch.randn(5, D))
    after_step(moe, 0)
    torch.testing.assert_close(moe.gate.e_score_correction_bias, torch.tensor([0.2, 0.1, 0.1, 0.1]))


def test_training_with_bias_control_balances_the_layer() -> None:
    balance = BalanceConfig(load_balancing=0, bias_update_rate=0.02, bias_centred=True)
    moe = layer(balance=balance, router={"score": "sigmoid", "selection_bias": True}).train()
    x = torch.randn(256, D) + 1
    violations = []
    for step in range(60):
        moe(x)
        violations.append(moe.balance.stats.max_violation())
        after_step(moe, step)
    assert violations[0] > 0.5
    assert max(violations[-5:]) < 0.25
    assert abs(moe.gate.e_score_correction_bias.mean().item()) < 1e-6


def test_training_with_the_loss_balances_the_layer() -> None:
    moe = layer(balance=BalanceConfig(load_balancing=1.0)).train()
    x = torch.randn(256, D) + 1
    optimizer = torch.optim.Adam(moe.parameters(), lr=1e-2)
    violations = []
    for step in range(60):
        moe(x)
        sum(balance_losses(moe).values()).backward()
        violations.append(moe.balance.stats.max_violation())
        optimizer.step()
        optimizer.zero_grad()
        after_step(moe, step)
    assert violations[0] > 0.5
    assert violations[-1] < 0.25


def test_copies_and_state_dicts_leave_the_routing_behind() -> None:
    moe = layer().train()
    x = torch.randn(4, D)
    moe(x)
    twin = copy.deepcopy(moe)
    assert twin.last is None
    assert moe.last is not None
    assert twin(x).equal(moe(x))
    fresh = layer(seed=9)
    fresh.load_state_dict(moe.state_dict())
    assert fresh(x).equal(moe(x))


def test_hooks_on_gate_and_experts_see_every_call_and_can_change_the_routing() -> None:
    moe = layer().train()
    routings = []

    def to_first_two(_, args, routing: Routing) -> Routing:
        return routing.with_assignments(torch.tensor([[0, 1]]).expand(routing.num_tokens, 2), routing.weight_TK)

    moe.gate.register_forward_hook(to_first_two)
    moe.experts.register_forward_pre_hook(lambda _, args: routings.append(args[1]))
    moe(torch.randn(2, 3, D))
    assert routings[0] is moe.last
    assert moe.balance.stats.sync().tolist() == [6, 6, 0, 0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"shared_gate": True}, "shared_gate"),
        ({"balance": BalanceConfig(bias_update_rate=0.1)}, "selection_bias"),
        ({"router": Router(D, 8, 2)}, "2 of 8 experts"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, says: str) -> None:
    settings = {"num_experts_per_tok": 2, **settings}
    with pytest.raises(ConfigError, match=says):
        MoE(D, 24, 4, settings.pop("num_experts_per_tok"), **settings)


def test_a_context_for_another_number_of_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"context\.document"):
        layer()(torch.randn(3, D), RoutingContext(document=torch.zeros(4, dtype=torch.int64)))


def test_half_precision_keeps_the_selection_bias_float32() -> None:
    moe = layer(router={"score": "sigmoid", "selection_bias": True}).to(torch.bfloat16)
    assert moe.gate.e_score_correction_bias.dtype == torch.float32
    y = moe(torch.randn(4, D, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
