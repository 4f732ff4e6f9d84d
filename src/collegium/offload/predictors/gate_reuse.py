"""Gate reuse: the input of this layer's router, given to the routers of the next layers.

The residual stream changes little from one layer to the next, so that the next router, asked early, mostly answers what
it will answer in time. Fate asks the next layer, HOBBIT and HybriMoE the next two or three. The norm before each router
has weights of its own, which `Gates` accounts for.

Legend: T tokens of a pass, E experts of a layer, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.offload.geometry import Geometry
from collegium.offload.predictors.base import Gates, Moment, Prediction, Predictor, PredictorSettings

if TYPE_CHECKING:
    from collegium.trace import Trace

__all__ = ["GateReuse"]


@method(
    "gate_reuse", kind="predictor", paper="Fate (2025); HOBBIT (2024) and HybriMoE (2025) look deeper",
    arxiv="2502.12224",
)  # fmt: skip
@dataclass(frozen=True)
class GateReuse(PredictorSettings):
    """The model's own routers, asked ahead of time. Nothing is fitted.

    Attributes:
        depth: layers ahead, at least 1.
    """

    needs_gates: ClassVar[bool] = True
    depth: int = 1

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ConfigError(f"depth must be at least 1, not {self.depth}")

    @property
    def needs_trace(self) -> bool:
        return False

    def build(self, geometry: Geometry, *, trace: Trace | None = None, gates: Gates | None = None) -> Predictor:
        if gates is None:
            raise ConfigError("gate_reuse asks the model's routers; give the model, not only its trace")
        return _GateReuse(geometry, gates, self.depth)


class _GateReuse(Predictor):
    needs = frozenset({"gate_input"})

    def __init__(self, geometry: Geometry, gates: Gates, depth: int) -> None:
        super().__init__(geometry)
        self.horizon = depth
        self._gates = gates

    def predict(self, moment: Moment) -> list[Prediction]:
        if moment.gate_input is None or moment.layer < 0:
            return []
        last = min(moment.layer + self.horizon, self.geometry.num_layers - 1)
        found = []
        for layer in range(moment.layer + 1, last + 1):
            scores = self._gates.scores(layer, moment.gate_input, moment.layer)
            found.append(Prediction(layer, _votes(scores, self.geometry.top_k[layer]).sum(0).cpu().numpy()))
        return found


def _votes(scores: torch.Tensor, K: int) -> torch.Tensor:
    """``[T, E]`` selection scores -> 1 to 1.5 for the K best of a token, below 0.5 for the others, in their order.

    Scores of routers differ in kind (logits, probabilities, with a bias, -inf outside a group); summed over tokens as
    they are, one token could outvote all others.
    """
    finite = scores.isfinite()
    low = torch.where(finite, scores, torch.inf).amin(1, keepdim=True)
    high = torch.where(finite, scores, -torch.inf).amax(1, keepdim=True)
    spread = torch.where(finite, (scores - low) / (high - low).clamp_min(1e-20), 0.0).clamp(0, 1)
    chosen = torch.zeros_like(scores).scatter_(1, scores.topk(min(K, scores.shape[1]), dim=1).indices, 1.0)
    return chosen + 0.5 * torch.where(finite, spread, 0.0)
