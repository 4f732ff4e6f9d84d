"""What the configs of MoE families call things. Data only; measured facts (E, shapes) come from the headers instead."""

from __future__ import annotations

from typing import Any

__all__ = [
    "BIAS_IS_PARAMETER",
    "KEYS",
    "SCORES",
    "TOP_K",
    "lookup",
]

KEYS: dict[str, tuple[str, ...]] = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"),
    "top_k": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_k",
        "moe_top_k",
        "top_k_experts",
        "num_selected_experts",
    ),
    "expert_width": ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size", "intermediate_size", "d_ff"),
    "shared": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
    "layers": ("num_hidden_layers", "n_layers", "num_layers", "n_layer"),
    "score": (
        "scoring_func",
        "score_function",
        "expert_selection_fn",
        "moe_router_activation_func",
    ),
}
"""Fact -> the config keys that may hold it, first match wins."""

_SECTIONS = (
    "collegium.moe",
    "",
    "text_config",
    "llm_config",
    "language_config",
    "ffn_config",
    "thinker_config.text_config",
)

_SIGMOID = """
    afmoe axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note exaone_moe flint glm4_moe
    glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa hy_v3 hy_v4 inkling kimi_k2 kimi_linear kolibri1 laguna lfm2_moe
    llama4 mimo_v2_flash minimax_m2 minimax_m3_vl muse_spark nemotron_h solar_open step3p5 step3p7
"""
_SOFTMAX = """
    aria dbrx deepseek_ocr2 deepseek_v2 diffusion_gemma doge ernie4_5_moe ernie4_5_vl_moe flex_olmo gemma4 gpt_oss
    granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe jamba jetmoe longcat_flash mellum minimax
    mistral4 mistral_large4 mixtral nllb-moe olmoe openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_moe
    qwen3_next qwen3_omni_moe qwen3_vl_moe qwen4_exp switch_transformers unlimited_ocr zaya
"""
SCORES: dict[str, str] = dict.fromkeys(_SIGMOID.split(), "sigmoid") | dict.fromkeys(_SOFTMAX.split(), "softmax")
"""model_type, without the ``_text`` of a sub-config -> score function, where the config does not say. A softmax over
the chosen k is softmax with renormalised weights, and sparsemixer's probabilities are a softmax: both are listed so."""

TOP_K: dict[str, int] = {"switch_transformers": 1, "nllb-moe": 2}
"""K of families whose config has no key for it."""

BIAS_IS_PARAMETER = frozenset({"afmoe", "ernie4_5_moe", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "laguna"})
"""Families that keep the selection bias as a parameter; elsewhere it is a buffer and not counted as one."""


def lookup(config: dict[str, Any], fact: str) -> Any:
    """The value of `fact` (a key of `KEYS`) in a raw config or one of its text sections; None if it is not there."""
    for section in _SECTIONS:
        table: Any = config
        for step in section.split(".") if section else ():
            table = table.get(step) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            continue
        for key in KEYS[fact]:
            if table.get(key) is not None:
                return table[key]
    return None
