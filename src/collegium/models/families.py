"""What the configs of MoE families call things. Data only; measured facts (E, shapes) come from the headers instead."""

from __future__ import annotations

from typing import Any

__all__ = ["BIAS_IS_PARAMETER", "KEYS", "SECTIONS", "TOP_K", "lookup"]

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
    "hidden_size": ("hidden_size", "d_model", "n_embd"),
    "layers": ("num_hidden_layers", "n_layers", "num_layers", "n_layer"),
    "groups": ("n_group", "num_expert_group"),
    "top_groups": ("topk_group",),
    "group_method": ("topk_method",),
    "score": (
        "scoring_func",
        "score_function",
        "expert_selection_fn",
        "moe_router_activation_func",
    ),
}
"""Fact -> the config keys that may hold it, first match wins."""

SECTIONS = (
    "collegium.moe",
    "",
    "text_config",
    "llm_config",
    "language_config",
    "ffn_config",
    "thinker_config.text_config",
)

TOP_K: dict[str, int] = {"switch_transformers": 1, "nllb-moe": 2}
"""K of families whose config has no key for it."""

BIAS_IS_PARAMETER = frozenset(
    {"afmoe", "ernie4_5_moe", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "inkling2_text", "laguna"}
)
"""Families that keep the selection bias as a parameter; elsewhere it is a buffer and not counted as one."""


def lookup(config: dict[str, Any], fact: str) -> Any:
    """The value of `fact` (a key of `KEYS`) in a raw config or one of its text sections; None if it is not there."""
    for section in SECTIONS:
        table: Any = config
        for step in section.split(".") if section else ():
            table = table.get(step) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            continue
        for key in KEYS[fact]:
            if table.get(key) is not None:
                return table[key]
    return None
