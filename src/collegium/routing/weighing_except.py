"""Weights that add up to 1 over some of the chosen experts only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.routing.parts import Part, Scores, Weigh
from collegium.routing.record import RoutingContext

__all__ = ["RenormalisedExcept"]


@method("renormalised_except", kind="weigh", paper="AdaMoE (2024)", arxiv="2406.13233")
@dataclass(frozen=True)
class RenormalisedExcept(Weigh):
    """The probability divided by the sum over a token's chosen experts, where the last ones of the layer count for
    nothing and weigh nothing: null experts (AdaMoE), the zero expert (MoE++, which keeps copy and constant experts in).
    A token that chose none of the others gets weights of 0.

    Formula:
        w_e = p_e / sum of p over the chosen with e < E - last;  w_e = 0 for e >= E - last

    Cost:
        none.

    Use it:
        with zero-computation experts that give nothing, so that choosing one does not shrink the others' outputs.

    Not:
        without such experts: the last ones of the layer would never be heard.

    Attributes:
        last: how many experts, from the highest id down, are left out.
    """

    symmetric = False
    last: int

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        if not 0 < self.last < num_experts:
            raise ConfigError(f"last is {self.last}; of {num_experts} experts it leaves out at least one and not all")

    def __call__(self, scores: Scores, index: Tensor, context: RoutingContext) -> Tensor:
        weight = scores.probs.gather(-1, index)
        # a selection that is not fixed has one column more, the sentinel's, whose probability is 0
        weight = weight * (index < self._experts(scores) - self.last)
        return weight / weight.sum(-1, keepdim=True).clamp(min=1e-20)

    @staticmethod
    def _experts(scores: Scores) -> int:
        return scores.selection.shape[-1]
