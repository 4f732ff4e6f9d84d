"""A bias per expert that steers selection and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.routing.parts import Scores, Transform
from collegium.routing.record import RoutingContext

__all__ = ["SelectionBias"]


@method("bias", kind="transform", paper="Auxiliary-Loss-Free Load Balancing (2024)", arxiv="2408.15664")
@dataclass(frozen=True)
class SelectionBias(Transform):
    """Adds the router's ``e_score_correction_bias [E]`` to the selection score.

    Probabilities and combine weights stay unbiased. The bias gets no gradient: a controller moves it after each step.

    Formula:
        selection_e = s_e + b_e

    Cost:
        E float32 numbers, which stay float32 whatever the dtype of the model.

    Use it:
        with a controller (``bias_update_rate`` of the balance) in place of a balance loss, or to read checkpoints that
        have such a bias.

    Not:
        alone: without a controller it stays zero.
    """

    needs_correction_bias = True

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        if scores.correction_bias is None:
            raise ConfigError("SelectionBias needs Scores.correction_bias, which is None")
        return replace(scores, selection=scores.selection + scores.correction_bias)
