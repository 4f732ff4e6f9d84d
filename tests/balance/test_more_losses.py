"""Losses that are named in ``balance.losses``, by hand; `test_balance_contract` has what those for balance share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from collegium.balance import BalanceConfig
from collegium.balance.extra import ClassBalance, DeviceBalance, ExpertRouterCoupling, RoutingEntropy
from collegium.errors import ConfigError
from collegium.experts.modules import Experts
from collegium.layer import MoE, balance_losses
from collegium.routing.record import Routing

T, E = 64, 8


def routed(expert: Tensor, probs: Tensor, num_true: int | None = None) -> Routing:
    weight = probs.gather(-1, expert)
    return Routing.from_topk(expert, weight, E, full=True, probs=probs, num_true=num_true)


def even() -> Tensor:
    return (torch.arange(T)[:, None] + torch.tensor([0, 4])) % E


def test_entropy_by_hand() -> None:
    loss = RoutingEntropy()
    assert float(loss(routed(even(), torch.full((T, E), 1 / E)), None)) == pytest.approx(math.log(E))
    sure = torch.nn.functional.one_hot(torch.zeros(T, dtype=torch.long), E).float().requires_grad_()
    value = loss(routed(even(), sure), None)
    assert float(value.detach()) == 0
    value.backward()
    assert torch.isfinite(sure.grad).all()


def test_devices_are_alike_where_their_experts_are_not() -> None:
    expert = torch.tensor([[0, 4]]).expand(T, 2)  # one expert of each of two devices, always the same one
    flat = torch.full((T, E), 1 / E)
    assert float(DeviceBalance(groups=2)(routed(expert, flat), None)) == pytest.approx(1)
    assert float(DeviceBalance(groups=4)(routed(expert, 4 * flat * (torch.arange(E) % 4 == 0)), None)) > 1.9


def test_null_experts_are_one_kind() -> None:
    probs = torch.full((T, E), 1 / E)
    one = torch.stack([torch.arange(T) % 4, torch.full((T,), 4)], 1)  # always the first of four null experts
    each = torch.stack([torch.arange(T) % 4, 4 + torch.arange(T) % 4], 1)
    values = [float(ClassBalance(merge=True)(routed(expert, probs, 4), None)) for expert in (one, each)]
    assert values[0] == pytest.approx(values[1])
    cheap = routed(each, torch.cat([torch.zeros(T, 4), torch.full((T, 4), 0.25)], 1), 4)
    assert float(ClassBalance(tau=0.5)(cheap, None)) == pytest.approx(0.5 * float(ClassBalance()(cheap, None)))


def test_coupling_wants_each_row_to_excite_its_own_expert() -> None:
    torch.manual_seed(0)
    d, f = 32, 8
    experts, loss = Experts(d, f, 4), ExpertRouterCoupling()
    router = torch.nn.Linear(d, 4, bias=False)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4, d))
        experts.gate_up_proj.zero_()
        for e in range(4):
            experts.gate_up_proj[e, :f, e] = 1.0  # the gate of expert e looks at coordinate e only
    assert float(loss(router, experts, (0,))) == 0
    with torch.no_grad():
        experts.gate_up_proj.copy_(experts.gate_up_proj.roll(1, 0))
    value = loss(router, experts, (0,))
    assert float(value) > 0.3
    value.backward()
    assert router.weight.grad.abs().sum() > 0
    assert experts.gate_up_proj.grad[:, :f].abs().sum() > 0
    assert experts.gate_up_proj.grad[:, f:].abs().sum() == 0
    assert (
        float(loss(router, experts, (0,))) == float(loss(router, experts, (0,))) != float(loss(router, experts, (1,)))
    )


def test_a_layer_has_the_losses_of_its_config() -> None:
    balance = BalanceConfig(
        load_balancing=0.0,
        losses=({"routing_entropy": {"coefficient": 0.5}}, "expert_router_coupling", {"device_balance": {"groups": 4}}),
    )
    layer = MoE(16, 8, E, 2, balance=balance).train()
    layer(torch.randn(5, 16))
    found = balance_losses(layer)
    assert found.keys() == {"routing_entropy", "expert_router_coupling", "device_balance"}
    sum(found.values()).backward()
    assert layer.gate.weight.grad is not None
    with pytest.raises(ConfigError, match="3 groups"):
        MoE(16, 8, E, 2, balance=BalanceConfig(losses=({"device_balance": {"groups": 3}},)))
