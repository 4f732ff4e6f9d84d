"""Our compute behind transformers' experts interface, as ``experts_implementation="collegium"``.

Every family whose experts class carries transformers' ``use_experts_implementation`` decorator looks its forward up in
one registry, so one registered function runs them all.
"""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from collegium.errors import ModelError
from collegium.experts.compute import compute
from collegium.experts.from_module import expert_weights
from collegium.routing import Routing

__all__ = ["NAME", "experts_forward", "register"]

NAME = "collegium"
"""The name to select: ``from_pretrained(..., experts_implementation=NAME)`` or ``set_experts_implementation(NAME)``."""


def register() -> None:
    """Make ``experts_implementation="collegium"`` known to transformers. Calling it again changes nothing.

    Experts quantised to FP8 or FP4 look their forward up in a registry of their own. There this name refuses, with a
    `ModelError` from the first forward that says how to load the model instead.
    """
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, _refuse_quantised)


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of an experts module's own forward.

    Under expert parallelism `module` holds this rank's experts only and the ids are local; an id at or above their
    number is a slot of another rank, and is left out.

    Args:
        hidden_states: ``[T, d]``.
        top_k_index: ``[T, K]`` expert ids.
        top_k_weights: ``[T, K]`` combine weights.

    Returns:
        ``[T, d]``, in the dtype of `hidden_states`.
    """
    weights = expert_weights(module)
    routing = Routing.from_topk(top_k_index, top_k_weights, weights.num_experts)
    return compute(hidden_states, routing, weights)


def _refuse_quantised(module: nn.Module, *args: object, **kwargs: object) -> NoReturn:
    raise ModelError(
        f"{type(module).__name__} holds FP8 or FP4 quantised experts, which experts_implementation={NAME!r} does not "
        "run; load the model with FineGrainedFP8Config(dequantize=True), or choose another experts_implementation"
    )
