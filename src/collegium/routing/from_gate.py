"""Our `Router` over the weights of a transformers gate, so that one code path serves all families.

A gate is recognised by its class name, and `FAMILIES` says how that family scores, limits, selects and weighs. What a
gate's instance can say for itself (top-k, groups, scaling, whether to renormalise) is read from it, never assumed.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.routing.parts import Score, Selection, Transform, Weigh
from collegium.routing.router import Router
from collegium.routing.scores import Sigmoid, Softmax
from collegium.routing.selection import SparseMixer, SparseMixerWeights, TopK
from collegium.routing.transforms import GroupLimit, LogitSelection, SelectionBias
from collegium.routing.weighing import Raw, Renormalised, SoftmaxSelected

__all__ = ["FAMILIES", "Family", "router_from_gate"]


def _raw(gate: Any) -> Weigh:
    return Raw()


def _renormalised(epsilon: float = 0.0) -> Callable[[Any], Weigh]:
    """Divided by the sum, unless the gate says ``norm_topk_prob = False``."""
    return lambda gate: Renormalised(epsilon) if getattr(gate, "norm_topk_prob", True) else Raw()


@dataclass(frozen=True)
class Family:
    """How the gates of some families route. Paths are attributes of the gate, or of the block after ``block.``.

    Attributes:
        score: logits -> probabilities.
        weigh: gate -> how combine weights are made.
        selection: gate -> how experts are chosen.
        top_k: fixed number of slots; None reads ``gate.top_k``.
        linear: path of the module that holds the projection; "" is the gate itself.
        correction_bias: path of the selection-only bias, or None.
        group_score: how groups are scored where the gate has them, or None if it never has.
        group_mask: selection score of the experts outside the kept groups.
        scaling: path of the factor on every weight, or None.
        on_logits: the selection looks at logits.
        float32_logits: the projection is computed in float32 whatever the model's dtype.
    """

    score: Score
    weigh: Callable[[Any], Weigh] = _raw
    selection: Callable[[Any], Selection] = lambda gate: TopK()
    top_k: int | None = None
    linear: str = ""
    correction_bias: str | None = None
    group_score: Literal["max", "top2_sum"] | None = None
    group_mask: float = -math.inf
    scaling: str | None = None
    on_logits: bool = False
    float32_logits: bool = False


_SOFTMAX = Family(Softmax(), _renormalised())
_LOGITS = Family(Softmax(), lambda gate: SoftmaxSelected(), on_logits=True)
_DEEPSEEK_V2 = Family(
    Softmax(), group_score="max", group_mask=0.0, scaling="routed_scaling_factor", float32_logits=True
)
_DEEPSEEK_V3 = Family(
    Sigmoid(),
    _renormalised(1e-20),
    correction_bias="e_score_correction_bias",
    group_score="top2_sum",
    scaling="routed_scaling_factor",
    float32_logits=True,
)
_MISTRAL_4 = Family(
    Softmax(), _renormalised(1e-20), group_score="top2_sum", group_mask=0.0, scaling="routed_scaling_factor"
)
_ERNIE = Family(
    Softmax(),
    lambda gate: Renormalised(minimum=gate.norm_min),
    correction_bias="moe_statics.e_score_correction_bias",
    float32_logits=True,
)
_HY_V3 = Family(
    Sigmoid(),
    _renormalised(1e-20),
    correction_bias="block.e_score_correction_bias",
    scaling="router_scaling_factor",
    float32_logits=True,
)
_LFM2 = Family(Sigmoid(), _renormalised(1e-6), correction_bias="block.expert_bias", scaling="routed_scaling_factor")
_AFMOE = Family(
    Sigmoid(), _renormalised(1e-20), linear="gate", correction_bias="block.expert_bias", scaling="route_scale"
)
# Phi-MoE's gate chooses two experts whatever its config says.
_PHIMOE = Family(
    Softmax(),
    lambda gate: SparseMixerWeights(gate.router_jitter_noise),
    lambda gate: SparseMixer(gate.router_jitter_noise),
    top_k=2,
    on_logits=True,
)

_STEMS = (
    (_SOFTMAX, "Mixtral MiniMax Olmoe FlexOlmo Mellum Qwen2Moe Qwen3Moe Qwen3Next Qwen3_5Moe Qwen3VLMoeText"),
    (_SOFTMAX, "Qwen3OmniMoeText Qwen3OmniMoeThinkerText Qwen3OmniMoeTalkerText Qwen4ExpText"),
    (Family(Softmax(), _renormalised(), linear="wg"), "HunYuanMoEV1"),
    (Family(Softmax()), "Jamba"),
    (_LOGITS, "GptOss GraniteMoe GraniteMoeSWA GraniteMoeHybrid GraniteMoeShared AriaText"),
    (_DEEPSEEK_V2, "DeepseekV2 DeepseekOcr2Text UnlimitedOcrText"),
    (_DEEPSEEK_V3, "DeepseekV3 DeepseekV32 Dots1 Dots3NoteText Glm4Moe Glm4MoeLite Glm4vMoeText Glm5NextText"),
    (_DEEPSEEK_V3, "GlmMoeDsa SolarOpen ExaoneMoe NemotronH MiMoV2Flash KimiLinear BailingHybrid AXK1 HYV4"),
    (replace(_DEEPSEEK_V3, scaling=None), "Beam"),  # scales after the experts
    (_MISTRAL_4, "Mistral4"),
    (replace(_MISTRAL_4, float32_logits=True), "MistralLarge4Text"),
    (_ERNIE, "Ernie4_5_Moe Ernie4_5_VLMoeMoe"),
    (Family(Sigmoid(), _renormalised(), correction_bias="block.e_score_correction_bias"), "MiniMaxM2"),
    (Family(Sigmoid(), _renormalised(), correction_bias="e_score_correction_bias"), "MiniMaxM3VL Step3p7"),
    (Family(Sigmoid(), _renormalised(), float32_logits=True), "Flint"),
    (_HY_V3, "HYV3"),
    (_LFM2, "Lfm2Moe"),
    (_AFMOE, "Afmoe"),
    (_PHIMOE, "Phimoe"),
)

FAMILIES: dict[str, Family] = {stem: family for family, stems in _STEMS for stem in stems.split()}
"""Class name of the gate, without its ``TopKRouter`` / ``Gate`` ending -> how it routes."""

_ENDING = re.compile(r"(TokenChoice|Top[kK])?(Router|Gate)$")


def router_from_gate(gate: Any, *, block: nn.Module | None = None, config: Any = None) -> Router:
    """A `Router` that routes exactly as `gate` does at inference, and shares its parameters.

    ``router.weight`` and ``router.bias`` are the gate's own Parameter objects. The correction bias shares its memory
    where it is float32 and is a float32 copy elsewhere. A `Router` is returned as it is.

    Args:
        gate: a transformers gate (module named ``gate`` or ``router`` of an MoE block).
        block: the MoE block around it; MiniMax-M2, HY-V3, LFM2-MoE and AFMoE keep the correction bias there.
        config: the model's config; its ``model_type`` is named in errors.

    Raises:
        UnsupportedFamilyError: the gate is of no known family; the message lists the known ones.
        ConfigError: the family keeps a bias on the block, but `block` is None.
    """
    if isinstance(gate, Router):
        return gate
    family = _family(gate, config)
    linear = attrgetter(family.linear)(gate) if family.linear else gate
    num_experts, hidden_size = linear.weight.shape
    correction_bias = _correction_bias(family, gate, block)
    with torch.device("meta"):
        router = Router(
            hidden_size,
            num_experts,
            family.top_k or gate.top_k,
            score=family.score,
            transforms=_transforms(family, gate, num_experts, correction_bias is not None),
            selection=family.selection(gate),
            weigh=family.weigh(gate),
            routed_scaling_factor=getattr(gate, family.scaling) if family.scaling else 1.0,
            float32_logits=family.float32_logits,
        )
    router.weight = linear.weight
    router.bias = getattr(linear, "bias", None)
    router.e_score_correction_bias = correction_bias
    if getattr(gate, "input_jitter_noise", 0.0) or getattr(block, "jitter_noise", 0.0):
        warnings.warn(
            f"{type(gate).__name__} multiplies its input with noise in training; the router made from it does not",
            stacklevel=2,
        )
    return router.train(gate.training)


def _family(gate: nn.Module, config: Any) -> Family:
    for cls in type(gate).__mro__:
        family = FAMILIES.get(_ENDING.sub("", cls.__name__))
        # A wrapper (sharding) subclasses the gate and keeps its forward; another forward is another gate.
        if family is not None and getattr(cls, "forward", None) is type(gate).forward:
            return family
    of = f" of model type {config.model_type!r}" if getattr(config, "model_type", None) else ""
    raise UnsupportedFamilyError(
        f"no router is known for the gate {type(gate).__name__}{of}; known are {', '.join(sorted(FAMILIES))}. "
        "If it routes like one of them, add its name to FAMILIES in collegium/routing/from_gate.py"
    )


def _correction_bias(family: Family, gate: Any, block: nn.Module | None) -> Tensor | None:
    """``[E]`` float32, sharing memory with the family's own tensor where that is float32."""
    if family.correction_bias is None or not getattr(gate, "use_expert_bias", True):
        return None
    path, owner = family.correction_bias, gate
    if path.startswith("block."):
        path, owner = path.removeprefix("block."), block
        if block is None:
            raise ConfigError(
                f"{type(gate).__name__} gets its {path} from the MoE block around it; pass block= as well"
            )
    bias = attrgetter(path)(owner)
    if bias.dim() == 1 and bias.dtype == torch.float32 and not isinstance(bias, nn.Parameter):
        return bias
    return bias.detach().reshape(-1).float()


def _transforms(family: Family, gate: Any, num_experts: int, biased: bool) -> list[Transform]:
    transforms: list[Transform] = []
    if family.on_logits:
        transforms.append(LogitSelection())
    if biased:
        transforms.append(SelectionBias())
    greedy = getattr(gate, "topk_method", None) == "greedy"
    if family.group_score is not None and not greedy and gate.num_group != gate.topk_group:
        transforms.append(GroupLimit(gate.num_group, gate.topk_group, family.group_score, family.group_mask))
    return transforms
