"""Tiny random models of any transformers family, built from the config class: `tiny_model("qwen3_moe")`.

Nothing is downloaded. Every size of the default config is replaced by a small one (`SMALL`), what a family needs beyond
that is in `FAMILY`. Routers get a larger init so that top-k margins are not ties, and correction biases are
not zero, so that choice and weight really differ.
"""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)

__all__ = [
    "SEAM", "SINCE", "families", "needs", "seam_model_type", "tiny_config", "tiny_inputs", "tiny_model",
]  # fmt: skip

_DECORATED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)
SEAM = [
    (file.parent.name, experts_class)
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
    for experts_class in _DECORATED.findall(file.read_text(encoding="utf-8"))
]
"""(family folder, class name) of every experts class behind transformers' experts interface, found in its source."""

SINCE = {
    "deepseek_v32": "5.11", "diffusion_gemma": "5.11", "minimax_m3_vl": "5.12",
    "granitemoe": "5.13", "granitemoehybrid": "5.13", "granitemoeshared": "5.13",
    "mimo_v2_flash": "5.13", "zaya": "5.13",
    "inkling": "5.14", "axk1": "5.15", "axk2": "5.15", "granitemoe_swa": "5.15", "qwen4_exp": "5.16",
    "glm5_next": "5.17", "hy_v4": "5.17", "kimi_linear": "5.17", "aria": "5.18",
    "bailing_hybrid": "5.20", "kolibri1": "5.20", "muse_spark": "5.20", "unlimited_ocr": "5.20",
    "beam": "5.21", "flint": "5.21", "mistral_large4": "5.22", "dots3_note": "5.23", "inkling2": "5.23",
}  # fmt: skip
"""Family folder -> the release of transformers that put its experts behind the interface, if it was after 5.10."""

SMALL: dict[str, Any] = {
    # widths
    "hidden_size": 32, "d_model": 32, "intermediate_size": 24, "d_ff": 24, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "shared_experts_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "intermediate_size_mlp": 24,
    "dense_intermediate_size": 24, "prefix_dense_intermediate_size": 24, "hidden_size_per_layer_input": 0,
    # depth
    "num_hidden_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_layers": 2, "num_decoder_layers": 2,
    # attention
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_heads": 4, "d_kv": 8,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4,
    "sliding_window": 8, "max_position_embeddings": 128, "model_max_length": 128,
    # experts
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1,
    # vision towers
    "depth": 1, "out_hidden_size": 32, "image_size": 28, "num_global_layers": 1, "vision_output_dim": 32,
    # tokens
    "vocab_size": 64, "vocab_size_per_layer_input": 64, "unpadded_vocab_size": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
"""Setting -> small value; applied where the family's default config has the setting and it is not None."""

HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR = {"linear_num_heads": 4, "linear_head_dim": 8}
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
RELATIVE = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 8,
            "rel_extent": 16, "d_rel": 4}  # fmt: skip
DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
GEMMA = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16, "global_head_dim": 8}

FAMILY: dict[str, dict[str, Any]] = {
    "bailing_hybrid": HYBRID | LINEAR | {"num_expert_group": 2},
    "beam": DENSE_THEN_SPARSE,
    "deepseek_v4": {"num_key_value_heads": 1, "head_dim": 16, "o_groups": 2, "o_lora_rank": 8, "hc_sinkhorn_iters": 2,
                    "num_hidden_layers": 2, "mlp_layer_types": ["hash_moe", "moe"]},
    "diffusion_gemma_text": GEMMA | {"num_global_key_value_heads": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": DENSE_THEN_SPARSE | {"per_layer_config": {}},
    # before, transformers has no forward with groups that works
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"
                    if Version(transformers.__version__) >= Version("5.13") else "greedy"},
    "deepseek_ocr2_text": DENSE_THEN_SPARSE | {"num_experts_per_tok": 2},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 8], "rope_parameters": {
        "rope_type": "default", "rope_theta": 500000.0, "mrope_section": [1, 1, 2]}} | DENSE_THEN_SPARSE,
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": GEMMA | {"enable_moe_block": True},
    "glm4v_moe_text": {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [1, 1, 2]}},
    "glm5_next_text": DENSE_THEN_SPARSE | HYBRID | LINEAR | {
        "qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 2, "hc_sinkhorn_iters": 2},
    "glm_moe_dsa": DENSE_THEN_SPARSE,
    "granitemoehybrid": HYBRID | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling_text": RELATIVE | {"n_shared_experts": 2},
    "inkling2_text": RELATIVE,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "kimi_linear": HYBRID | LINEAR | {"num_expert_group": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mistral4": {"head_dim": 16},
    "muse_spark_text": {"moe_hidden_size": 16},
    "nemotron_h": {"num_hidden_layers": None, "hybrid_override_pattern": "ME*E",
                   "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "qwen3_5_moe_text": HYBRID | DELTA,
    "qwen3_next": HYBRID | DELTA,
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "qwen4_exp_text": HYBRID | DELTA | {
        "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
        "indexer_budget": 8, "indexer_compress_ratio": 4},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "router_jitter_noise": 0.0},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
"""What a family needs beyond `SMALL`."""

CORRECTION_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The default config of `model_type` with every size made small; sub-configs too, their overrides as dicts."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class().to_dict()
    settings = {k: v for k, v in SMALL.items() if default.get(k) is not None}
    if default.get("num_key_value_heads") and default["num_key_value_heads"] == default.get("num_attention_heads"):
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= FAMILY.get(model_type, {}) | overrides
    for name in config_class.sub_configs:
        sub_type = (default.get(name) or {}).get("model_type")
        if sub_type in CONFIG_MAPPING:
            settings[name] = tiny_config(sub_type, **settings.get(name, {}))
    return config_class(**settings)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that runs `config`: the causal LM if there is one, else the family's base model."""
    mappings = [MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_MAPPING]
    if "text_config" in config.sub_configs:
        mappings.insert(0, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    for mapping in mappings:
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    # text backbones of some multimodal families are in no auto mapping
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    return next(
        found
        for name, found in vars(module).items()
        if getattr(found, "config_class", None) is type(config) and not name.endswith("PreTrainedModel")
    )


def tiny_model(model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random float32 model of `model_type` in eval mode; the same seed gives the same weights."""
    config = tiny_config(model_type, **overrides)
    torch.manual_seed(seed)
    model = model_class(config)(config)
    randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Give routers and experts weights whose effects are well above rounding."""
    with torch.no_grad():
        for module in model.modules():
            for name in ("gate", "router"):
                gate = getattr(module, name, None)
                if isinstance(gate, nn.Module) and isinstance(getattr(module, "experts", None), nn.Module):
                    for tensor in [*gate.parameters(), *module.experts.parameters()]:
                        tensor.normal_(std=0.3, generator=generator)
                    for bias in correction_biases(module):
                        bias.normal_(std=0.1, generator=generator)
                    if hasattr(gate, "tid2eid"):
                        V, K = gate.tid2eid.shape
                        gate.tid2eid.copy_(torch.rand(V, gate.num_experts, generator=generator).topk(K).indices)


def correction_biases(block: nn.Module) -> list[Tensor]:
    """Selection biases of a MoE block, wherever the family keeps them."""
    named = [*block.named_buffers(), *block.named_parameters()]
    return [tensor for name, tensor in named if name.rpartition(".")[2] in CORRECTION_BIASES]


def tiny_inputs(model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids for `model`, ``[batch, length]``; with decoder ids for encoder-decoders."""
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "qwen3_omni_moe_talker_text":  # it has no embed_tokens
        return {"inputs_embeds": torch.randn(batch, length, model.config.hidden_size, generator=generator)}
    vocabulary = model.config.get_text_config().vocab_size
    names = ["input_ids", "decoder_input_ids"] if model.config.is_encoder_decoder else ["input_ids"]
    return {name: torch.randint(3, vocabulary, (batch, length), generator=generator) for name in names}


def families(*model_types: str) -> list[Any]:
    """`model_types` for ``parametrize``; those that this release of transformers lacks are skipped by name."""
    return [pytest.param(model_type, marks=needs(model_type), id=model_type) for model_type in model_types]


def needs(model_type: str) -> pytest.MarkDecorator:
    """Skips a test where transformers is older than what it has to have for `model_type`."""
    # Step-3.5 and 3.7 are outside the interface
    came = {"": "5.10", "step3p": "5.16", **SINCE}
    since = came[max((name for name in came if model_type.startswith(name)), key=len)]
    return pytest.mark.skipif(
        Version(transformers.__version__) < Version(since),
        reason=f"{model_type} needs transformers {since}: before, it is not there or not behind the experts interface",
    )


@cache
def seam_model_type(family: str, experts_class: str) -> str:
    """The model type of `family` whose tiny model holds experts of this class.

    Raises:
        LookupError: no tiny model of the family does; `FAMILY` needs an entry.
    """
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    types = {c.model_type for c in vars(module).values() if inspect.isclass(c) and getattr(c, "model_type", "")}
    for model_type in sorted(types & set(CONFIG_MAPPING), key=lambda name: (len(name), name)):
        other_tower = ("talker" in model_type) != ("Talker" in experts_class) or re.search("vision|audio", model_type)
        if CONFIG_MAPPING[model_type].sub_configs or other_tower:
            continue
        if any(type(module).__name__ == experts_class for module in tiny_model(model_type).modules()):
            return model_type
    raise LookupError(f"no tiny {family} model holds a {experts_class}")
