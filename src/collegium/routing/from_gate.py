"""Our `Router` over the weights of a transformers gate, so that one code path serves all families.

A gate is recognised by its class name, and `FAMILIES` says how that family scores, limits, selects and weighs. What a
gate's instance can say for itself (top-k, groups, scaling, whether to renormalise) is read from it, never assumed.

In some families and older releases of transformers the gate only computes logits and the block around it decides. What
the gate does not say is then read from the block, and where the gate is a plain Linear the class of the block tells the
family.
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
    """How the gates of some families route. Paths are attributes of the gate, or of the block if the gate lacks them.

    Attributes:
        score: logits -> probabilities.
        weigh: gate -> how combine weights are made.
        selection: gate -> how experts are chosen.
        top_k: fixed number of slots; None reads ``top_k``.
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
    correction_bias="e_score_correction_bias",
    scaling="router_scaling_factor",
    float32_logits=True,
)
_LFM2 = Family(Sigmoid(), _renormalised(1e-6), correction_bias="expert_bias", scaling="routed_scaling_factor")
_AFMOE = Family(Sigmoid(), _renormalised(1e-20), correction_bias="expert_bias", scaling="route_scale")
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
    (_SOFTMAX, "Qwen3OmniMoeText Qwen3OmniMoeThinkerText Qwen3OmniMoeTalkerText Qwen4ExpText HunYuanMoEV1"),
    (Family(Softmax()), "Jamba"),
    (_LOGITS, "GptOss GraniteMoe GraniteMoeSWA GraniteMoeHybrid GraniteMoeShared AriaText"),
    (_DEEPSEEK_V2, "DeepseekV2 DeepseekOcr2Text UnlimitedOcrText"),
    (_DEEPSEEK_V3, "DeepseekV3 DeepseekV32 Dots1 Dots3NoteText Glm4Moe Glm4MoeLite Glm4vMoeText Glm5NextText"),
    (_DEEPSEEK_V3, "GlmMoeDsa SolarOpen ExaoneMoe NemotronH MiMoV2Flash KimiLinear BailingHybrid AXK1 HYV4"),
    (replace(_DEEPSEEK_V3, scaling=None), "Beam"),  # scales after the experts
    (_MISTRAL_4, "Mistral4"),
    (replace(_MISTRAL_4, float32_logits=True), "MistralLarge4Text"),
    (_ERNIE, "Ernie4_5_Moe Ernie4_5_VLMoeMoe"),
    (Family(Sigmoid(), _renormalised(), correction_bias="e_score_correction_bias"), "MiniMaxM2 MiniMaxM3VL Step3p7"),
    (Family(Sigmoid(), _renormalised(), float32_logits=True), "Flint"),
    (_HY_V3, "HYV3"),
    (_LFM2, "Lfm2Moe"),
    (_AFMOE, "Afmoe"),
    (_PHIMOE, "Phimoe"),
)

FAMILIES: dict[str, Family] = {stem: family for family, stems in _STEMS for stem in stems.split()}
"""Class name of the gate without its ``TopKRouter`` / ``Gate`` ending -> how it routes. It is the stem of the block's
class, too."""

_ENDING = re.compile(r"(TokenChoice|Top[kK])?(Router|Gate|Gating)$")
_BLOCK_ENDING = re.compile(r"(SparseMoeBlock|Moe|MoE)$")
_ALIASES = {"num_group": "n_group"}


class _Facts:
    """Attributes of a gate, or of the block around it where the gate lacks them."""

    def __init__(self, gate: nn.Module, block: nn.Module | None) -> None:
        self._owners = (gate,) if block is None else (gate, block)

    def __getattr__(self, name: str) -> Any:
        for owner in self._owners:
            for key in (name, _ALIASES.get(name, name)):
                if hasattr(owner, key):
                    return getattr(owner, key)
        classes = " nor ".join(type(owner).__name__ for owner in self._owners)
        raise AttributeError(f"no {name} in {classes}", name=name)


def router_from_gate(gate: Any, *, block: nn.Module | None = None, config: Any = None) -> Router:
    """A `Router` that routes exactly as `gate` does at inference, and shares its parameters.

    ``router.weight`` and ``router.bias`` are the gate's own Parameter objects. The correction bias shares its memory
    where it is float32 and is a float32 copy elsewhere. A `Router` is returned as it is.

    Args:
        gate: a transformers gate (module named ``gate`` or ``router`` of an MoE block).
        block: the MoE block around it. MiniMax-M2, HY-V3, LFM2-MoE and AFMoE keep the correction bias there, and some
            families in older releases of transformers all of the routing.
        config: the model's config; its ``model_type`` is named in errors.

    Raises:
        UnsupportedFamilyError: the gate is of no known family; the message lists the known ones.
        ConfigError: the family keeps on the block what `gate` does not say, but `block` is None.
    """
    if isinstance(gate, Router):
        return gate
    family, facts = _family(gate, block, config), _Facts(gate, block)
    linear: Any = gate if hasattr(gate, "weight") else next(m for m in gate.children() if isinstance(m, nn.Linear))
    try:
        correction_bias = _correction_bias(family, facts)
        router = _empty_router(family, facts, linear.weight.shape, correction_bias is not None)
    except AttributeError as error:
        if block is not None:
            raise
        raise ConfigError(
            f"{type(gate).__name__} gets its {error.name} from the MoE block around it; pass block= as well"
        ) from error
    router.weight = linear.weight
    router.bias = getattr(linear, "bias", None)
    router.e_score_correction_bias = correction_bias
    if getattr(gate, "input_jitter_noise", 0.0) or getattr(block, "jitter_noise", 0.0):
        warnings.warn(
            f"{type(gate).__name__} multiplies its input with noise in training; the router made from it does not",
            stacklevel=2,
        )
    return router.train(gate.training)


def _empty_router(family: Family, facts: Any, shape: torch.Size, biased: bool) -> Router:
    """The family's router without its parameters, for a projection of `shape` ``[E, d]``."""
    num_experts, hidden_size = shape
    with torch.device("meta"):
        return Router(
            hidden_size,
            num_experts,
            family.top_k or facts.top_k,
            score=family.score,
            transforms=_transforms(family, facts, num_experts, biased),
            selection=family.selection(facts),
            weigh=family.weigh(facts),
            routed_scaling_factor=getattr(facts, family.scaling) if family.scaling else 1.0,
            float32_logits=family.float32_logits,
        )


def _family(gate: nn.Module, block: nn.Module | None, config: Any) -> Family:
    plain = type(gate).forward is nn.Linear.forward
    decider, ending = (block, _BLOCK_ENDING) if plain and block is not None else (gate, _ENDING)
    for cls in type(decider).__mro__:
        family = FAMILIES.get(ending.sub("", cls.__name__))
        # A wrapper (sharding) subclasses the gate and keeps its forward; another forward is another gate.
        if family is not None and getattr(cls, "forward", None) is type(decider).forward:
            return family
    within = f" in {type(block).__name__}" if block is not None else ""
    of = f" of model type {config.model_type!r}" if getattr(config, "model_type", None) else ""
    hint = "A plain Linear is known by the block around it: pass block=. " if plain and block is None else ""
    raise UnsupportedFamilyError(
        f"no router is known for the gate {type(gate).__name__}{within}{of}; known are {', '.join(sorted(FAMILIES))}. "
        f"{hint}If it routes like one of them, add its name to FAMILIES in collegium/routing/from_gate.py"
    )


def _correction_bias(family: Family, facts: Any) -> Tensor | None:
    """``[E]`` float32, sharing memory with the family's own tensor where that is float32."""
    if family.correction_bias is None or not getattr(facts, "use_expert_bias", True):
        return None
    bias = attrgetter(family.correction_bias)(facts)
    if bias.dim() == 1 and bias.dtype == torch.float32 and not isinstance(bias, nn.Parameter):
        return bias
    return bias.detach().reshape(-1).float()


def _transforms(family: Family, facts: Any, num_experts: int, biased: bool) -> list[Transform]:
    transforms: list[Transform] = []
    if family.on_logits:
        transforms.append(LogitSelection())
    if biased:
        transforms.append(SelectionBias())
    greedy = getattr(facts, "topk_method", None) == "greedy"
    if family.group_score is not None and not greedy and facts.num_group != facts.topk_group:
        transforms.append(GroupLimit(facts.num_group, facts.topk_group, family.group_score, family.group_mask))
    return transforms
