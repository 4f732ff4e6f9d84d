"""Turn a model with `MoE` blocks into a plain model of a transformers family, which any engine loads.

A wrapped model goes back to its own family. A model with fresh blocks goes to a family whose attention is that of its
base and whose MoE can express its settings; `export` says which setting is in the way where none is.

    family        base                        MoE
    mixtral       llama, mistral, mixtral     softmax, renormalised, all layers
    qwen3_moe     qwen3, qwen3_moe            softmax, dense layers allowed
    olmoe         olmoe                       softmax, all layers
    deepseek_v3   deepseek_v3                 sigmoid, groups, selection bias, shared experts, dense layers first
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from collegium.errors import ConfigError, NotMoEError
from collegium.layer import moe_layers
from collegium.models.blocks import BlockMoE, family_of
from collegium.models.config import MoEConfig
from collegium.models.folder import unwrapped

__all__ = ["export"]


@dataclass(frozen=True)
class _Source:
    """A model with fresh MoE blocks, as the families' rules see it."""

    base: dict[str, Any]
    moe: MoEConfig
    layers: list[int]

    @property
    def depth(self) -> int:
        return self.base["num_hidden_layers"]

    @property
    def dense(self) -> list[int]:
        return [layer for layer in range(self.depth) if layer not in self.layers]

    @property
    def hidden_act(self) -> str:
        return self.moe.hidden_act or self.base["hidden_act"]


Rule = tuple[str, Any, bool, str]
"""Setting, its value, whether the family can express it, and what the family has instead."""


def _softmax_rules(s: _Source) -> list[Rule]:
    """What mixtral, qwen3_moe and olmoe have in common."""
    m = s.moe
    return [
        ("scoring_func", m.scoring_func, m.scoring_func == "softmax", "softmax"),
        ("routed_scaling_factor", m.routed_scaling_factor, m.routed_scaling_factor == 1, "1"),
        ("n_group", m.n_group, (m.n_group or 1) == (m.topk_group or 1), "no groups"),
        ("selection_bias", True, not m.has_selection_bias, "none"),
        ("router_bias", True, not m.router_bias, "none"),
        *_own_parts(m),
        ("shared experts of width", m.shared_width, not m.shared_width, "none"),
    ]


def _own_parts(m: MoEConfig) -> list[Rule]:
    """What no family has."""
    return [
        ("router", m.router, m.router is None, "a router that fields describe"),
        ("zero_experts", m.zero_experts, not m.zero_experts, "none"),
        ("iterations", m.iterations, m.iterations == 1, "1"),
        ("inner_residual", m.inner_residual, not m.inner_residual, "none"),
    ]


def _every_layer(s: _Source) -> list[Rule]:
    return [("dense layers", s.dense, not s.dense, "an MoE in every layer")]


def _mixtral_rules(s: _Source) -> list[Rule]:
    return [
        *_softmax_rules(s),
        *_every_layer(s),
        ("norm_topk_prob", False, s.moe.norm_topk_prob, "always true"),
        ("attention_bias", True, not s.base.get("attention_bias"), "none"),
    ]


def _mixtral_settings(s: _Source) -> dict[str, Any]:
    return {
        "num_local_experts": s.moe.num_experts,
        "intermediate_size": s.moe.moe_intermediate_size,
        "hidden_act": s.hidden_act,
    }


def _qwen3_moe_rules(s: _Source) -> list[Rule]:
    window = [kind for kind in s.base.get("layer_types") or [] if kind != "full_attention"]
    return [
        *_softmax_rules(s),
        ("layer_types", window[:1], not window, "full attention"),
        _same_activation(s),
    ]


def _qwen3_moe_settings(s: _Source) -> dict[str, Any]:
    return {
        "num_experts": s.moe.num_experts,
        "moe_intermediate_size": s.moe.moe_intermediate_size,
        "intermediate_size": s.base["intermediate_size"],
        "norm_topk_prob": s.moe.norm_topk_prob,
        "mlp_only_layers": s.dense,
        "decoder_sparse_step": 1,
    }


def _olmoe_rules(s: _Source) -> list[Rule]:
    return [*_softmax_rules(s), *_every_layer(s)]


def _olmoe_settings(s: _Source) -> dict[str, Any]:
    return {
        "num_experts": s.moe.num_experts,
        "intermediate_size": s.moe.moe_intermediate_size,
        "norm_topk_prob": s.moe.norm_topk_prob,
        "hidden_act": s.hidden_act,
    }


def _deepseek_v3_rules(s: _Source) -> list[Rule]:
    m = s.moe
    size = m.num_experts // (m.n_group or 1)
    return [
        ("scoring_func", m.scoring_func, m.scoring_func == "sigmoid", "sigmoid"),
        ("router_bias", True, not m.router_bias, "none"),
        *_own_parts(m),
        ("shared_expert_gate", True, not m.shared_expert_gate, "none"),
        (
            "shared_expert_intermediate_size",
            m.shared_width,
            m.shared_width > 0 and m.shared_width % m.moe_intermediate_size == 0,
            f"one or more shared experts of width {m.moe_intermediate_size}",
        ),
        ("experts per group", size, size >= 2, "2 or more"),
        ("dense layers", s.dense, s.dense == list(range(len(s.dense))), "dense layers at the start only"),
        _same_activation(s),
    ]


def _deepseek_v3_settings(s: _Source) -> dict[str, Any]:
    return {
        "n_routed_experts": s.moe.num_experts,
        "moe_intermediate_size": s.moe.moe_intermediate_size,
        "n_shared_experts": s.moe.shared_width // s.moe.moe_intermediate_size,
        "routed_scaling_factor": s.moe.routed_scaling_factor,
        "n_group": s.moe.n_group or 1,
        "topk_group": s.moe.topk_group or 1,
        "norm_topk_prob": s.moe.norm_topk_prob,
        "first_k_dense_replace": len(s.dense),
    }


def _same_activation(s: _Source) -> Rule:
    return ("hidden_act", s.hidden_act, s.hidden_act == s.base["hidden_act"], f"the base's, {s.base['hidden_act']}")


@dataclass(frozen=True)
class _Family:
    bases: tuple[str, ...]
    attention: str
    rules: Callable[[_Source], list[Rule]]
    settings: Callable[[_Source], dict[str, Any]]


FAMILIES = {
    "mixtral": _Family(
        ("llama", "mistral", "mixtral"), "grouped-query attention without norms", _mixtral_rules, _mixtral_settings
    ),
    "qwen3_moe": _Family(
        ("qwen3", "qwen3_moe"), "query and key norms per head", _qwen3_moe_rules, _qwen3_moe_settings
    ),
    "olmoe": _Family(("olmoe",), "query and key norms over all heads", _olmoe_rules, _olmoe_settings),
    "deepseek_v3": _Family(
        ("deepseek_v3",), "multi-head latent attention", _deepseek_v3_rules, _deepseek_v3_settings
    ),
}  # fmt: skip


def export(model: PreTrainedModel, family: str) -> PreTrainedModel:
    """A plain transformers model of `family` with copies of the weights of `model` and, in float32, its logits.

    Half-precision logits can differ slightly, because some families compute router logits in half precision.

    Args:
        model: holds `MoE` blocks of ours; unchanged.
        family: a key of `FAMILIES`, or the model's own type if its blocks are wrapped ones.

    Raises:
        ConfigError: the family cannot express this model; the message names the settings and what it has instead.
        NotMoEError: the model has no MoE block of ours.
    """
    layers = moe_layers(model)
    if not layers:
        raise NotMoEError("this model has no MoE block of ours, so there is nothing to export; save it as it is")
    own = family_of(model)
    if all(isinstance(layer, BlockMoE) and layer.origin is not None for layer in layers):
        if family not in (own, model.config.model_type):
            raise ConfigError(f"the wrapped blocks are those of {own}; export to {own!r}, not to {family!r}")
        with unwrapped(model):
            plain = copy.deepcopy(model)
        del plain.config.collegium
        return plain
    if family not in FAMILIES:
        raise ConfigError(f"cannot export to {family!r}; there are {', '.join(FAMILIES)}")
    target = FAMILIES[family]
    if own not in target.bases:
        raise ConfigError(
            f"cannot export to {family}: it has {target.attention}, so its base must be "
            f"{' or '.join(target.bases)}, not {own}"
        )
    section = model.config.collegium
    source = _Source(model.config.to_dict(), MoEConfig.model_validate(section["moe"]), section["layers"])
    wrong = [
        f"{name} = {value!r} (it has {instead})" for name, value, fits, instead in target.rules(source) if not fits
    ]
    if wrong:
        raise ConfigError(f"cannot export to {family}, which cannot express {'; '.join(wrong)}")
    return _build(model, family, _config_of(source, family, target.settings(source)))


def _config_of(source: _Source, family: str, settings: dict[str, Any]) -> dict[str, Any]:
    """All settings that base and family share, then those of the MoE."""
    known = AutoConfig.for_model(family).to_dict().keys() | {"head_dim"}
    skip = {"model_type", "architectures", "transformers_version", "_name_or_path"}
    config = {key: value for key, value in source.base.items() if key in known - skip}
    # their loss is K times ours at equal loads
    loss = source.moe.balance.load_balancing / source.moe.num_experts_per_tok
    return config | {"num_experts_per_tok": source.moe.num_experts_per_tok, "router_aux_loss_coef": loss} | settings


def _build(model: PreTrainedModel, family: str, settings: dict[str, Any]) -> PreTrainedModel:
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=model.dtype)
    tensors = model.state_dict()
    biases = {name: module for name, module in plain.named_modules() if hasattr(module, "e_score_correction_bias")}
    for name, gate in biases.items():
        # float32 in every dtype of the model; an absent bias is zero
        gate.e_score_correction_bias = gate.e_score_correction_bias.float()
        zeros = torch.zeros(gate.e_score_correction_bias.shape)
        tensors.setdefault(f"{name}.e_score_correction_bias", zeros)
    plain.load_state_dict(tensors)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.to(model.device).train(model.training)
