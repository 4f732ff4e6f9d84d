"""What every member of the kinds "balance" and "controller" promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from collegium.catalog import methods
from collegium.routing.record import Routing

BALANCE = [pytest.param(m.obj, id=m.name) for m in methods("balance")]
CONTROLLER = [pytest.param(m.obj, id=m.name) for m in methods("controller")]


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


@pytest.mark.parametrize("controller", CONTROLLER)
def test_a_controller_lowers_the_overloaded_and_raises_the_starved(controller) -> None:
    bias = torch.zeros(4)
    controller().update(bias, torch.tensor([70, 10, 10, 30]), step=0)
    assert bias[0] < 0
    assert (bias[1:3] > 0).all()
    assert bias[3].item() == pytest.approx(0, abs=1e-8)  # exactly the mean load


@pytest.mark.parametrize("controller", CONTROLLER)
def test_a_controller_rests_at_balance_and_without_tokens(controller) -> None:
    for counts in (torch.full((4,), 9), torch.zeros(4, dtype=torch.int64)):
        bias = torch.tensor([0.5, -0.5, 0.25, -0.25])
        controller().update(bias, counts, step=3)
        assert bias.tolist() == [0.5, -0.5, 0.25, -0.25]
