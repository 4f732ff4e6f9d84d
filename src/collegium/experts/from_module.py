"""`ExpertWeights` of any transformers experts module that goes through the common seam."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.integrations import use_experts_implementation

from collegium.errors import UnsupportedFamilyError
from collegium.experts.activations import name_of
from collegium.experts.weights import ExpertWeights

__all__ = ["expert_weights"]

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


# what the decorator gives to a class that has no gate of its own
_DEFAULT_GATE = use_experts_implementation(type("_Plain", (nn.Module,), {}))._apply_gate


def expert_weights(module: Any) -> ExpertWeights:
    """The parameters of an experts module of transformers, with the layout its decorator declares. Nothing is copied.

    Args:
        module: instance of a class under ``@use_experts_implementation`` (``Qwen3MoeExperts``, ``GptOssExperts``, ...).

    Raises:
        UnsupportedFamilyError: the module lacks the decorator's flags or the 3-D parameters.
    """
    gated = getattr(module, "has_gate", True)
    up = "gate_up_proj" if gated else "up_proj"
    lacking = [name for name in (*_FLAGS, up, "down_proj") if not hasattr(module, name)]
    if lacking:
        raise UnsupportedFamilyError(
            f"{type(module).__name__} is not an experts module of transformers' common seam: no {', '.join(lacking)}"
        )
    act_fn: Any = getattr(module, "act_fn", None)
    # the bound method, not the class's: a wrapper around the module hands on its methods
    gate = getattr(module, "_apply_gate", None)
    plain = not gated or (getattr(gate, "__func__", None) is _DEFAULT_GATE and module.is_concatenated)
    return ExpertWeights(
        up=getattr(module, up),
        down=module.down_proj,
        activation=gate if gated and gate is not None else act_fn,
        up_bias=getattr(module, f"{up}_bias") if module.has_bias else None,
        down_bias=module.down_proj_bias if module.has_bias else None,
        transposed=module.is_transposed,
        gated=gated,
        interleaved=not module.is_concatenated,
        fused_activation=name_of(act_fn) if plain else None,
        # older releases of transformers have no experts with a norm, and no flag for it
        post_norm=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,
    )
