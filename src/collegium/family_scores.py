"""The score function of each MoE family, by ``model_type``, for configs that do not name it."""

from __future__ import annotations

__all__ = ["family_score"]

_SIGMOID = """
    afmoe axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note exaone_moe flint glm4_moe
    glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa hy_v3 hy_v4 inkling inkling2 kimi_k2 kimi_linear kolibri1 laguna
    lfm2_moe llama4 mimo_v2_flash minimax_m2 minimax_m3_vl muse_spark nemotron_h solar_open step3p5 step3p7
"""
_SOFTMAX = """
    aria dbrx deepseek_ocr2 deepseek_v2 diffusion_gemma doge ernie4_5_moe ernie4_5_vl_moe flex_olmo gemma4 gpt_oss
    granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe jamba jetmoe longcat_flash mellum minimax
    mistral4 mistral_large4 mixtral nllb-moe olmoe openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_moe
    qwen3_next qwen3_omni_moe qwen3_vl_moe qwen4_exp switch_transformers unlimited_ocr zaya
"""
_SCORES = dict.fromkeys(_SIGMOID.split(), "sigmoid") | dict.fromkeys(_SOFTMAX.split(), "softmax")

_PARTS = ("_text", "_talker_text", "_vision_encoder")
"""Endings that multimodal models put behind the family's name in the ``model_type`` of a sub-config."""


def family_score(model_type: str) -> str | None:
    """What makes probabilities of the gate's logits in a family: ``"softmax"``, ``"sigmoid"``, or None if unknown.

    A softmax over the chosen k is softmax with renormalised weights, and sparsemixer's probabilities are a softmax:
    both are listed so.
    """
    for ending in ("", *_PARTS):
        if model_type.endswith(ending) and model_type.removesuffix(ending) in _SCORES:
            return _SCORES[model_type.removesuffix(ending)]
    return None
