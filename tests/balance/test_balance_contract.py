"""What every member of the kind "balance" promises, and every routing loss that says it is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from collegium.balance.extra import DeviceBalance, RoutingLoss
from collegium.balance.stats import LoadStats
from collegium.catalog import methods
from collegium.routing.record import Routing
from collegium.testing import check_balance_loss

BALANCE = [pytest.param(m.obj, id=m.name) for m in methods("balance")]
ROUTING = [pytest.param(m.name, m.obj, id=m.name) for m in methods("routing_loss") if m.obj.is_balance]
SETTINGS: dict[str, dict[str, Any]] = {"device_balance": {"groups": 4}}
"""Where the defaults do not tell experts apart."""


def routing_like(share: Tensor, T: int = 100) -> Routing:
    """Tokens choose experts as often as they find them probable: load = probability = `share`, logsumexp = 1."""
    expert = torch.arange(len(share)).repeat_interleave((share * T).round().long())
    logits = (share.log() + 1).expand(len(expert), -1).clone().requires_grad_()
    return Routing.from_topk(
        expert[:, None], torch.ones(len(expert), 1), len(share), logits=logits, probs=logits.softmax(-1)
    )


UNIFORM = torch.full((4,), 0.25)
SKEWED = torch.tensor([0.7, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("loss", BALANCE)
def test_uniform_load_is_no_worse_than_a_skewed_one(loss) -> None:
    assert loss(routing_like(UNIFORM)) <= loss(routing_like(SKEWED)) + 1e-6


@pytest.mark.parametrize("loss", BALANCE)
def test_descent_lowers_the_overloaded_expert_against_the_others(loss) -> None:
    routing = routing_like(SKEWED)
    loss(routing).backward()
    gradient = routing.logits.grad.sum(0)
    assert gradient[0] > gradient[1:].max()


@pytest.mark.parametrize("loss", BALANCE)
def test_a_loss_is_a_finite_float32_scalar_that_ignores_padding(loss) -> None:
    routing = routing_like(SKEWED)
    value = loss(routing)
    assert value.shape == ()
    assert value.dtype == torch.float32
    doubled = Routing.from_topk(
        routing.index_TK.repeat(2, 1),
        routing.weight_TK.repeat(2, 1),
        4,
        logits=torch.cat([routing.logits, routing.logits.flip(-1)]),
        probs=torch.cat([routing.probs, routing.probs.flip(-1)]),
        valid=torch.arange(200) < 100,
    )
    assert loss(doubled).item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize(("name", "cls"), ROUTING)
def test_routing_losses_that_are_balance(name: str, cls: type[RoutingLoss]) -> None:
    check_balance_loss(lambda E: cls(**SETTINGS.get(name, {})))


@dataclass(frozen=True)
class Scaled(RoutingLoss):
    """E times the mean square of the mean probabilities, times `factor`; padding counts if it is to."""

    factor: float = 1.0
    padding: bool = False
    cut: bool = False

    def __call__(self, routing: Routing, stats: LoadStats | None) -> Tensor:
        assert routing.probs is not None
        probs = routing.probs.detach() + 0 * routing.probs if self.cut else routing.probs
        probs = probs if routing.valid is None or self.padding else probs[routing.valid]
        return self.factor * routing.num_experts * probs.mean(0).square().sum()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (Scaled(factor=2.0), "at even load it is 2"),
        (DeviceBalance(groups=1), "does not grow with skew"),
        (Scaled(padding=True), "padding changes it"),
        (Scaled(cut=True), "does not lower an overloaded expert"),
    ],
    ids=lambda one: one if isinstance(one, str) else None,
)
def test_a_loss_that_breaks_the_contract_is_told_so(loss: RoutingLoss, words: str) -> None:
    check_balance_loss(lambda E: Scaled())
    with pytest.raises(AssertionError, match=words):
        check_balance_loss(lambda E: loss)
