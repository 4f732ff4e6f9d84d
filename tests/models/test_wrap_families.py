"""Wrapping the MoE blocks of transformers' families: same parameters, same outputs, and refusals by name."""

from __future__ import annotations

import pytest
import torch

from collegium.balance import BalanceConfig
from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.layer import MoE, after_step, balance_losses, moe_layers
from collegium.models import install
from collegium.models.folder import unwrapped
from tiny import SEAM, families, seam_model_type, tiny_inputs, tiny_model

REFUSED = {
    "axk1": "post_mlp_layernorm",
    "axk2": "AXK2TopkRouter",
    "cohere2_moe": "Cohere2MoeTopKRouter",
    "deepseek_v4": "takes input_ids",
    "diffusion_gemma": "takes position_embeddings",
    "ernie4_5_vl_moe": "same shape",
    "gemma4": "takes per_layer_input",
    "inkling": "InklingTopkRouter",
    "inkling2": "Inkling2TopKRouter",
    "kolibri1": "Kolibri1TopKRouter",
    "laguna": "LagunaTopKRouter",
    "muse_spark": "MuseSparkTopkRouter",
    "openai_privacy_filter": "OpenAIPrivacyFilterTopKRouter",
    "zaya": "takes prev_router_hidden_states",
}
"""Families whose block is more than gate, experts and shared experts, or whose gate no router of ours stands for."""


def output(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


@pytest.mark.parametrize(("family", "experts_class"), SEAM, ids=[f"{f}-{c}" for f, c in SEAM])
def test_wrapping_changes_no_output_and_shares_every_parameter_or_refuses_by_name(
    family: str, experts_class: str
) -> None:
    model = tiny_model(seam_model_type(family, experts_class))
    if family in REFUSED:
        with pytest.raises(UnsupportedFamilyError, match=REFUSED[family]):
            install(model)
        assert moe_layers(model) == []
        return
    inputs = tiny_inputs(model)
    before = output(model, inputs)
    parameters = {id(p) for p in model.parameters()}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    names = list(model.state_dict())

    install(model)
    assert moe_layers(model)
    torch.testing.assert_close(output(model, inputs), before, rtol=0, atol=1e-5)  # sums in another order
    # what a family keeps as a frozen parameter, such as AFMoE's bias, may become a buffer
    assert trained <= {id(p) for p in model.parameters()} <= parameters

    with unwrapped(model):
        assert list(model.state_dict()) == names
        torch.testing.assert_close(output(model, inputs), before, rtol=0, atol=0)
    assert moe_layers(model)


@pytest.mark.parametrize("family", families("qwen2_moe", "gpt_oss", "deepseek_v3", "ernie4_5_moe", "granitemoe"))
def test_a_wrapped_model_trains_with_our_balance(family: str) -> None:
    biased = family in ("deepseek_v3", "ernie4_5_moe")
    balance = BalanceConfig(load_balancing=0.1, z_loss=1e-3, bias_update_rate=0.01 if biased else 0)
    model = install(tiny_model(family), balance=balance).train()
    inputs = tiny_inputs(model)
    gates = [moe.gate.weight.detach().clone() for moe in moe_layers(model)]
    biases = [moe.gate.e_score_correction_bias.clone() for moe in moe_layers(model)] if biased else []
    loss = model(**inputs, labels=inputs["input_ids"]).loss + sum(balance_losses(model).values())
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after_step(model, 0)
    assert loss.isfinite()
    assert all(not moe.gate.weight.equal(old) for moe, old in zip(moe_layers(model), gates, strict=True))
    after = output(model.eval(), inputs)
    for moe, old in zip(moe_layers(model), biases, strict=bool(biases)):
        assert not moe.gate.e_score_correction_bias.equal(old)
    with unwrapped(model):  # the original blocks see what training changed, the bias too
        torch.testing.assert_close(output(model, inputs), after, rtol=0, atol=1e-5)  # sums in another order


def test_the_original_follows_a_cast_and_a_load() -> None:
    model, other = install(tiny_model("ernie4_5_moe")), install(tiny_model("ernie4_5_moe", seed=5))
    model.load_state_dict(other.state_dict(), assign=True)
    inputs = tiny_inputs(model)
    with unwrapped(model):
        torch.testing.assert_close(
            output(model, inputs), output(other, inputs), rtol=0, atol=1e-5
        )  # sums in another order
    model.to(torch.bfloat16)
    assert output(model, inputs).dtype == torch.bfloat16
    with unwrapped(model):
        block = next(layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts"))
        assert block.experts.down_proj.dtype == torch.bfloat16


def test_chosen_layers_only() -> None:
    model = install(tiny_model("olmoe"), layers=[1])
    assert [moe.layer_index for moe in moe_layers(model)] == [1]
    assert not isinstance(model.model.layers[0].mlp, MoE)


def test_a_balance_that_does_not_fit_leaves_the_model_alone() -> None:
    model = tiny_model("olmoe")
    with pytest.raises(ConfigError, match="selection_bias"):
        install(model, balance=BalanceConfig(bias_update_rate=1e-3))
    assert moe_layers(model) == []


def test_experts_of_another_build_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedFamilyError, match=r"llama4_text.*interface"):
        install(tiny_model("llama4_text"))


def test_transformers_own_balance_loss_is_not_lost_silently() -> None:
    with pytest.raises(ConfigError, match="output_router_logits"):
        install(tiny_model("olmoe", output_router_logits=True))


def test_a_block_that_scales_its_output_is_found_out_by_comparing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("olmoe")
    block = type(model.model.layers[0].mlp)
    plain = block.forward
    monkeypatch.setattr(block, "forward", lambda self, hidden_states: 1.5 * plain(self, hidden_states))
    with pytest.raises(UnsupportedFamilyError, match=r"olmoe.*differ by"):
        install(model)
