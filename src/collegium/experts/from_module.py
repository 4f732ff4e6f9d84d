"""`ExpertWeights` of any transformers experts module that uses the common seam."""

from __future__ import annotations

from typing import Any

from collegium.experts.weights import ExpertWeights

__all__ = ["expert_weights"]


def expert_weights(module: Any) -> ExpertWeights:
    gated = module.has_gate
    return ExpertWeights(
        up=module.gate_up_proj if gated else module.up_proj,
        down=module.down_proj,
        activation=module._apply_gate if gated else module.act_fn,
        up_bias=(module.gate_up_proj_bias if gated else module.up_proj_bias) if module.has_bias else None,
        down_bias=module.down_proj_bias if module.has_bias else None,
        transposed=module.is_transposed,
        gated=gated,
        interleaved=not module.is_concatenated,
        post_norm=module.post_expert_norm if module.has_post_expert_norm else None,
    )
