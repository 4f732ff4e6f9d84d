"""The previous layer's logits, carried on."""

from __future__ import annotations

from dataclasses import dataclass

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.routing.parts import OwnTensor, Scores, Transform
from collegium.routing.record import RoutingContext

__all__ = ["GatingResidual"]


@method("gating_residual", kind="transform", paper="MoE++ (2024)", arxiv="2410.07348")
@dataclass(frozen=True)
class GatingResidual(Transform):
    """Adds ``G z`` of the previous MoE layer's logits z, its own residual included; the first layer has none.

    G ``[E, E]`` is learnt and begins as zeros, so that training begins from plain routing. All layers need the same E.
    """

    symmetric = False
    touches = "logits"
    needs_previous_layer = True

    def tensors(self, hidden_size: int, num_experts: int, top_k: int) -> dict[str, OwnTensor]:
        return {"weight": OwnTensor((num_experts, num_experts), std=0.0)}

    def check_context(self, context: RoutingContext) -> None:
        """The first MoE layer of a model has nothing before it."""

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        if context.previous is None:
            return scores
        before = context.previous.logits
        if before is None or before.shape != scores.logits.shape:
            found = None if before is None else tuple(before.shape)
            raise ConfigError(
                f"the gating residual adds the previous MoE layer's logits, which are {found} where this layer's are "
                f"{tuple(scores.logits.shape)}; all layers need as many experts"
            )
        return scores.with_logits(scores.logits + before @ scores.own["weight"].T)
