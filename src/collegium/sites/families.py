"""What the structure of a block cannot tell, by ``model_type``."""

from __future__ import annotations

from typing import Any

__all__ = ["UNSUPPORTED", "logits_module", "score_of"]

_SIGMOID = """
    afmoe axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note exaone_moe flint glm4_moe
    glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa hy_v3 hy_v4 inkling inkling2 kimi_linear kolibri1 laguna lfm2_moe
    llama4 mimo_v2_flash minimax_m2 minimax_m3_vl muse_spark nemotron_h solar_open
"""
_SOFTMAX = """
    aria deepseek_ocr2 deepseek_v2 diffusion_gemma ernie4_5_moe ernie4_5_vl_moe flex_olmo gemma4 gpt_oss granitemoe
    granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe jamba mellum minimax mistral4 mistral_large4
    mixtral nllb-moe olmoe openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe
    qwen3_vl_moe qwen4_exp switch_transformers unlimited_ocr zaya
"""
_SCORES = dict.fromkeys(_SIGMOID.split(), "sigmoid") | dict.fromkeys(_SOFTMAX.split(), "softmax")

_PARTS = ("_text", "_talker_text", "_vision_encoder")
"""Endings that multimodal models put behind the family's name in the ``model_type`` of a sub-config."""

UNSUPPORTED = {
    "dbrx": "its experts are flattened into one matrix and its gate returns logits only",
    "doge": "its experts are rows of embedding tables behind product keys",
    "jetmoe": "it has experts in its attention too, and its gate returns a 5-tuple",
    "longcat_flash": "its experts module runs zero-compute experts of its own",
    "step3p5": "its experts module does not use transformers' experts interface",
    "step3p7": "its experts module does not use transformers' experts interface",
    "vitpose_backbone": "its experts are chosen by the data set, not by a gate",
}
"""Families with experts that no adapter covers -> why."""


def score_of(family: str, config: Any) -> str:
    """What makes probabilities of a gate's logits: the config's own word for it, then the family's, else "unknown"."""
    for name in ("scoring_func", "expert_selection_fn"):
        if isinstance(getattr(config, name, None), str):
            return getattr(config, name)
    for ending in ("", *_PARTS):
        if family.endswith(ending) and family.removesuffix(ending) in _SCORES:
            return _SCORES[family.removesuffix(ending)]
    return "unknown"


def logits_module(family: str) -> str | None:
    """Path, inside the gate, of the module whose output is the logits; None where the gate returns them itself."""
    # the gates of these two return probabilities in the place of logits
    return "proj" if family.startswith(("gemma4", "diffusion_gemma")) else None
