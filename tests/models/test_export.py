"""Export to plain families: the same logits, loadable by plain transformers, and refusals that name the setting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from collegium.balance import BalanceConfig
from collegium.errors import ConfigError, NotMoEError
from collegium.layer import moe_layers
from collegium.models import MoEConfig, export, install
from tiny import tiny_inputs, tiny_model

SMALL = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SIGMOID = {"scoring_func": "sigmoid", "n_shared_experts": 2}
EXPORTS = [
    ("llama", "mixtral", {}),
    ("mistral", "mixtral", {"num_experts_per_tok": 3}),
    ("qwen3", "qwen3_moe", {}),
    ("qwen3", "qwen3_moe", {"norm_topk_prob": False, "first_k_dense_replace": 1}),
    ("olmoe", "olmoe", {"norm_topk_prob": False}),
    ("deepseek_v3", "deepseek_v3", {**SIGMOID, "first_k_dense_replace": 1}),
    ("deepseek_v3", "deepseek_v3", {**SIGMOID, "norm_topk_prob": False, "selection_bias": True}),
    ("deepseek_v3", "deepseek_v3", {**SIGMOID, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}),
]


def installed(base: str, settings: dict, **overrides):
    """A model whose routers and experts matter, and whose selection bias, if any, is not zero."""
    model = install(tiny_model(base, **overrides), MoEConfig(**{**SMALL, **settings}))
    torch.manual_seed(0)
    for moe in moe_layers(model):
        moe.reset_parameters(0.3)
        if moe.gate.e_score_correction_bias is not None:
            moe.gate.e_score_correction_bias.normal_(std=0.1)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(model)).logits


@pytest.mark.parametrize(("base", "family", "settings"), EXPORTS)
def test_the_exported_model_and_its_folder_give_our_logits(
    tmp_path: Path, base: str, family: str, settings: dict
) -> None:
    model = installed(base, settings)
    plain = export(model, family)
    assert plain.config.model_type == family
    assert moe_layers(plain) == []
    assert not hasattr(plain.config, "collegium")
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)
    plain.save_pretrained(tmp_path)
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-5)


def test_tied_embeddings_and_dense_layers_in_between() -> None:
    model = install(
        tiny_model("qwen3", tie_word_embeddings=True, num_hidden_layers=3), MoEConfig(**SMALL), layers=[0, 2]
    )
    plain = export(model, "qwen3_moe")
    assert plain.config.mlp_only_layers == [1]
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)


def test_a_wrapped_model_goes_back_to_its_own_family_with_copies() -> None:
    model = install(tiny_model("qwen2_moe"))
    plain = export(model, "qwen2_moe")
    assert moe_layers(plain) == []
    assert not hasattr(plain.config, "collegium")
    # our kernels and transformers' sum in another order
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)
    with torch.no_grad():
        moe_layers(model)[0].gate.weight.zero_()
    assert plain.model.layers[0].mlp.gate.weight.abs().max() > 0
    with pytest.raises(ConfigError, match="qwen2_moe"):
        export(model, "mixtral")


def test_the_balance_coefficient_is_converted() -> None:
    model = installed("llama", {"balance": BalanceConfig(load_balancing=0.03)})
    assert export(model, "mixtral").config.router_aux_loss_coef == pytest.approx(0.015)


def test_bfloat16_keeps_the_selection_bias_float32() -> None:
    model = installed("deepseek_v3", {**SIGMOID, "selection_bias": True}).to(torch.bfloat16)
    gate = export(model, "deepseek_v3").model.layers[0].mlp.gate
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert gate.e_score_correction_bias.equal(moe_layers(model)[0].gate.e_score_correction_bias)


@pytest.mark.parametrize(
    ("base", "family", "settings", "says"),
    [
        ("llama", "mixtral", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
        ("llama", "mixtral", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("llama", "mixtral", {"first_k_dense_replace": 1}, r"dense layers = \[0\]"),
        ("llama", "mixtral", {"n_shared_experts": 1}, "shared experts of width = 16"),
        ("llama", "mixtral", {"router_bias": True}, "router_bias"),
        ("qwen3", "qwen3_moe", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("qwen3", "qwen3_moe", {"selection_bias": True}, "selection_bias"),
        ("qwen3", "qwen3_moe", {"n_group": 2, "topk_group": 1}, "n_group"),
        ("qwen3", "qwen3_moe", {"routed_scaling_factor": 2.0}, "routed_scaling_factor = 2.0"),
        ("qwen3", "qwen3_moe", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("olmoe", "olmoe", {"n_shared_experts": 1}, "shared experts"),
        ("deepseek_v3", "deepseek_v3", {"n_shared_experts": 1}, "scoring_func = 'softmax'"),
        ("deepseek_v3", "deepseek_v3", {"scoring_func": "sigmoid"}, "shared_expert_intermediate_size = 0"),
        ("deepseek_v3", "deepseek_v3", {**SIGMOID, "shared_expert_gate": True}, "shared_expert_gate"),
        ("llama", "qwen3_moe", {}, "query and key norms per head.*not llama"),
        ("qwen3", "deepseek_v3", SIGMOID, "latent attention.*not qwen3"),
        ("qwen3", "olmoe", {}, "not qwen3"),
        ("llama", "gpt2", {}, "there are mixtral, qwen3_moe"),
    ],
)
def test_what_a_family_cannot_express_is_named(base: str, family: str, settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        export(installed(base, settings), family)


def test_attention_biases_and_windows_are_named() -> None:
    with pytest.raises(ConfigError, match="attention_bias"):
        export(installed("llama", {}, attention_bias=True), "mixtral")
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    with pytest.raises(ConfigError, match=r"layer_types.*sliding_attention"):
        export(installed("qwen3", {}, **window), "qwen3_moe")
    with pytest.raises(NotMoEError, match="no MoE block of ours"):
        export(tiny_model("llama"), "mixtral")
