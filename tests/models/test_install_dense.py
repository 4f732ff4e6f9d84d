"""Fresh MoE blocks in dense (and other) models: where they go, how they start, and that they train."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from collegium.balance import BalanceConfig
from collegium.errors import ConfigError, NotMoEError, UnsupportedFamilyError
from collegium.layer import after_step, balance_losses, moe_layers, use_context
from collegium.models import MoEConfig, install
from collegium.routing.record import RoutingContext
from tiny import tiny_inputs, tiny_model

SMALL = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_one_optimizer_step_changes_router_and_experts(family: str) -> None:
    model = install(tiny_model(family), MoEConfig(**SMALL, n_shared_experts=1)).train()
    inputs = tiny_inputs(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert loss.isfinite()
    (loss + sum(balance_losses(model).values())).backward()
    optimizer.step()
    after_step(model, 0)
    # an expert that got no token stays; the router and the shared expert always learn
    for name, p in model.named_parameters():
        if "gate.weight" in name or "shared_experts" in name:
            assert not p.equal(before[name]), name
    assert sum(not p.equal(before[n]) for n, p in model.named_parameters() if "mlp.experts.down_proj" in n) == 2


def test_blocks_start_with_the_models_own_deviation_width_and_activation() -> None:
    model = tiny_model("qwen3", hidden_size=64, initializer_range=0.05, hidden_act="gelu")
    install(model, MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, n_shared_experts=2))
    moe = moe_layers(model)[1]
    assert moe.experts.gate_up_proj.shape == (8, 96, 64)
    assert moe.shared_experts.gate_proj.weight.shape == (96, 64)
    assert isinstance(
        moe.shared_experts.act_fn, type(tiny_model("qwen3", hidden_act="gelu").model.layers[0].mlp.act_fn)
    )
    for weight in (moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj, moe.shared_experts.up_proj.weight):
        assert weight.std().item() == pytest.approx(0.05, rel=0.15)
    assert [m.layer_index for m in moe_layers(model)] == [0, 1]


def test_first_layers_stay_dense_and_layers_can_be_chosen() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    install(model, MoEConfig(**SMALL, first_k_dense_replace=1))
    assert [m.layer_index for m in moe_layers(model)] == [1, 2, 3]
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"
    model = install(tiny_model("llama", num_hidden_layers=4), MoEConfig(**SMALL), layers=[3, 1])
    assert [m.layer_index for m in moe_layers(model)] == [1, 3]
    assert model.config.collegium["layers"] == [1, 3]


def test_dtype_mode_and_selection_bias() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    install(model, MoEConfig(**SMALL, scoring_func="sigmoid", balance=BalanceConfig(bias_update_rate=1e-3)))
    moe = moe_layers(model)[0]
    assert moe.experts.down_proj.dtype == torch.bfloat16
    assert moe.gate.e_score_correction_bias.dtype == torch.float32
    assert not moe.training
    assert model(**tiny_inputs(model)).logits.isfinite().all()


def test_a_moe_base_gets_fresh_blocks_if_a_config_is_given() -> None:
    # gpt-oss unpacks (output, scores) from its block, so the new block has to return a pair
    for family in ("olmoe", "gpt_oss"):
        model = install(tiny_model(family), MoEConfig(**SMALL)).train()
        inputs = tiny_inputs(model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(m.gate.weight.shape == (4, 32) and m.gate.weight.grad is not None for m in moe_layers(model))


def test_generation_runs_through_the_new_blocks() -> None:
    model = install(tiny_model("llama"), MoEConfig(**SMALL))
    ids = tiny_inputs(model)["input_ids"]
    with torch.no_grad():
        cached = model.generate(ids, max_new_tokens=4, do_sample=False)
        plain = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert cached.shape[1] > ids.shape[1]
    assert cached.equal(plain)


def test_gradient_checkpointing_counts_once_and_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        model = install(tiny_model("llama"), MoEConfig(**SMALL, balance=BalanceConfig(load_balancing=0.5)))
        torch.manual_seed(0)
        for moe in moe_layers(model):
            moe.reset_parameters(0.3)
        if recompute:
            model.gradient_checkpointing_enable()
        model.train()
        inputs = tiny_inputs(model)
        with use_context(model, RoutingContext(valid=torch.arange(24) < 20)):
            loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
            (loss + sum(balance_losses(model).values())).backward()
        assert [m.balance.stats.sync().sum().item() for m in moe_layers(model)] == [40, 40]
        gradients.append([m.gate.weight.grad for m in moe_layers(model)])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(
    ("settings", "layers", "says"),
    [
        ({}, [7], r"layers \[7\]"),
        ({}, [], "cannot be replaced"),
        ({"first_k_dense_replace": 1}, [0], r"layers \[0\]"),
        ({"first_k_dense_replace": 2}, None, "cannot be replaced"),
    ],
)
def test_settings_that_do_not_fit_are_refused_and_leave_the_model_alone(settings: dict, layers, says: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=says):
        install(model, MoEConfig(**SMALL, **settings), layers=layers)
    assert moe_layers(model) == []
    assert not hasattr(model.config, "collegium")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts_per_tok": 5},
        {"num_experts": 0},
        {"n_group": 3, "topk_group": 1},
        {"scoring_func": "vibes"},
        {"n_shared_experts": 1, "shared_expert_intermediate_size": 8},
        {"shared_expert_gate": True},
        {"selection_bias": False, "balance": {"bias_update_rate": 1e-3}},
        {"experts": 4},
        {"balance": {"scope": "universe"}},
    ],
)
def test_a_config_refuses_settings_that_exclude_each_other(settings: dict) -> None:
    with pytest.raises(ValidationError):
        MoEConfig(**{**SMALL, **settings})


def test_models_that_cannot_take_blocks_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedFamilyError, match="gpt2"):
        install(tiny_model("gpt2"), MoEConfig(**SMALL))
    with pytest.raises(UnsupportedFamilyError, match=r"deepseek_v4.*input_ids"):
        install(tiny_model("deepseek_v4"), MoEConfig(**SMALL))
    with pytest.raises(NotMoEError, match="llama"):
        install(tiny_model("llama"))
    with pytest.raises(ConfigError, match="already"):
        install(install(tiny_model("llama"), MoEConfig(**SMALL)), MoEConfig(**SMALL))
    with pytest.raises(ConfigError, match="balance="):
        install(tiny_model("llama"), MoEConfig(**SMALL), balance=BalanceConfig())
