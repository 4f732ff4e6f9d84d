"""`Predictor`: what is known so far -> how likely each expert of the coming layers is.

Predictions only move bytes. What the model computes never depends on them, and a test gives the engine a predictor that
is always wrong to make sure.

Legend: T tokens of a forward pass, L layers, E experts of a layer, K slots, d model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from collegium.offload.geometry import Array, Geometry

if TYPE_CHECKING:
    import torch

    from collegium.trace import Trace

__all__ = ["FEW", "Gates", "Moment", "Prediction", "Predictor", "PredictorSettings"]


FEW = 32
"""Up to so many tokens of a pass a predictor is asked. A prompt's tokens need nearly all experts of every layer."""


@dataclass(frozen=True, eq=False)
class Moment:
    """What is known when the router of a layer has answered, before its experts are computed.

    Attributes:
        layer: which, counted from 0; -1 before the first one, when only the tokens are known.
        tokens: ``[T]`` token ids of the pass.
        experts: ``[T, K]`` of every layer up to this one, ids >= E are unused slots.
        gate_input: ``[T, d]`` what this layer's router saw; None where nobody asked for it, and at -1.
    """

    layer: int
    tokens: Array
    experts: Sequence[Array] = field(default_factory=tuple)
    gate_input: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Prediction:
    """Scores ``[E]`` of one coming layer: higher is likelier, summed over the tokens of the pass; they need not be
    probabilities, but the K highest for a token are what the predictor would name."""

    layer: int
    scores: Array


class Gates(Protocol):
    """The routers of the model, for predictors that ask them."""

    def scores(self, layer: int, gate_input: torch.Tensor, seen_at: int) -> torch.Tensor:
        """``[T, E]`` selection scores of `layer`'s router for what the router of `seen_at` saw ``[T, d]``, the norm
        before each of them accounted for."""


class Predictor(ABC):
    """A fitted predictor.

    Attributes:
        needs: what the moment must hold beyond tokens and experts.
        horizon: layers ahead that it can speak of.
    """

    needs: ClassVar[frozenset[Literal["gate_input"]]] = frozenset()
    horizon: int = 1

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def begin(self) -> None:
        """A new sequence starts."""

    @abstractmethod
    def predict(self, moment: Moment) -> list[Prediction]:
        """Scores of coming layers, nearest first; at most `horizon`, none beyond the last layer."""


@dataclass(frozen=True)
class PredictorSettings(ABC):
    """Settings of a predictor.

    Attributes:
        needs_gates: it asks the model's routers.
    """

    needs_gates: ClassVar[bool] = False

    @property
    def needs_trace(self) -> bool:
        """It is fitted on a trace."""
        return True

    @abstractmethod
    def build(self, geometry: Geometry, *, trace: Trace | None = None, gates: Gates | None = None) -> Predictor:
        """A predictor fitted on a trace, or asking `gates`. Raises ConfigError where what it needs is not given."""
