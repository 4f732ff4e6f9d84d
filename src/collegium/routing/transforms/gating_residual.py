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
    """Adds the previous MoE layer's logits, its own residual included, through a learnt matrix; the first layer has
    none.

    Formula:
        z^l = W^l x + G^l z^(l-1),  G zeros at first, so that training begins from plain routing

    Cost:
        ``E^2`` parameters and as many multiplications for a token; a layer's logits are kept until the next one has
        run.

    Use it:
        where layers should agree on how hard a token is, as with zero-computation experts.

    Not:
        where layers differ in their number of experts, which is refused, or do not see each other's logits, as between
        stages of a pipeline.
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
