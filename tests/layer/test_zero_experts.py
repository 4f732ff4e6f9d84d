"""Zero-computation experts: what they give, and that they never enter dispatch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from collegium import models
from collegium.errors import ConfigError
from collegium.experts.zero import ConstantExpert, ZeroComputeExperts
from collegium.layer import MoE
from collegium.models import MoEConfig, install
from collegium.routing.record import Routing
from tiny import tiny_inputs, tiny_model


def test_what_each_kind_gives() -> None:
    x = torch.randn(4, 6)
    zero = ZeroComputeExperts(["constant", "copy", "zero"], 6)
    # experts 0 and 1 compute, 2 is constant, 3 copies, 4 is zero
    index = torch.tensor([[0, 2], [3, 4], [4, 1], [3, 2]])
    weight = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.5, 0.5], [0.2, 0.8]])
    routing = Routing.from_topk(index, weight, 5, full=True, num_true=2)
    constant = zero[0]
    assert isinstance(constant, ConstantExpert)
    share = (x @ constant.weight.T).softmax(-1)
    gives = share[:, :1] * x + share[:, 1:] * constant.value
    right = torch.stack([0.4 * gives[0], 0.7 * x[1], 0 * x[2], 0.2 * x[3] + 0.8 * gives[3]])
    torch.testing.assert_close(zero(x, routing), right)
    assert routing.only_true().expert.tolist() == [0, 1]
    assert routing.only_true().token.tolist() == [0, 2]
    assert routing.only_true().dispatch().counts.tolist() == [1, 1]


def test_dropped_assignments_give_nothing() -> None:
    x = torch.randn(3, 6)
    index = torch.tensor([[1], [1], [1]])
    kept = torch.tensor([True, False, True])
    plain = Routing.from_topk(index, torch.ones(3, 1), 2, full=True, num_true=1)
    routing = Routing(plain.expert, plain.weight, 3, 2, slots=1, kept=kept, num_true=1)
    found = ZeroComputeExperts(["copy"], 6)(x, routing)
    assert torch.equal(found, x * kept[:, None])


def test_gradients_reach_them_and_the_router() -> None:
    layer = MoE(8, 4, 2, 2, zero_experts=["constant", "copy"]).train()
    layer(torch.randn(30, 8)).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_names_and_numbers_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="there are constant, copy, zero"):
        ZeroComputeExperts(["nothing"], 8)
    with pytest.raises(ConfigError, match="from 1 to 5 experts"):
        MoE(8, 4, 2, 6, zero_experts=["zero"] * 3)


@pytest.mark.parametrize("system", ["adamoe", "moe_plus_plus", "deepseek_moe", "moge", "dynamic_moe", "loss_free"])
def test_a_model_is_saved_and_loaded_and_writes_on_with_a_cache(system: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    config = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router": system}
    install(model, MoEConfig.model_validate(config)).eval()
    for module in model.modules():
        if isinstance(module, MoE):
            torch.nn.init.normal_(module.gate.weight, std=0.5)
    ids = tiny_inputs(model, batch=1, length=12)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        past = model(input_ids=ids[:, :-3], use_cache=True)
        steps = [past.logits[:, -1]]
        for at in range(ids.shape[1] - 3, ids.shape[1] - 1):
            past = model(input_ids=ids[:, at : at + 1], past_key_values=past.past_key_values, use_cache=True)
            steps.append(past.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, -4:-1], rtol=1e-4, atol=1e-5)
    models.save(model, tmp_path / "model")
    again = models.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, whole)
