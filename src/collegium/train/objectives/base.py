"""`StepObjective`: forward and backward of a micro-batch.

Legend: B sequences, S positions, N = B*(S-1) predicted tokens, T = B*S tokens, d width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from collegium.layer import balance_losses, use_context
from collegium.routing.record import RoutingContext
from collegium.train.objective import Objective

__all__ = ["MicroBatch", "StepObjective"]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one process runs at a time, and its place in the optimizer step.

    Attributes:
        predictor: over the model.
        inputs: keyword arguments of the model.
        context: what its routers may look at, ``[T]`` each.
        predicted: tokens that the whole step predicts, over all micro-batches and processes.
        micro_batches: of the whole step; all are equally large.
        precision: bfloat16 runs under autocast.
    """

    predictor: Objective
    inputs: dict[str, Tensor]
    context: RoutingContext
    predicted: int
    micro_batches: int = 1
    precision: torch.dtype = torch.float32

    @contextlib.contextmanager
    def routed(self, draw: int = 0) -> Iterator[None]:
        """Give routers the context of one forward pass; keep its backward pass inside, too.

        The backward pass may compute activations anew and must then see the same context.

        Args:
            draw: number of the pass, from 0. Random choices differ between passes.
        """
        with use_context(self.predictor.model, replace(self.context, draw=draw)):
            yield

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """What the forward pass runs under."""
        device = self.inputs["input_ids"].device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def balance(self, passes: int = 1) -> dict[str, Tensor]:
        """The layers' balance losses of the latest pass, by name: its share of the step's, one of `passes` alike.

        Each is a mean over the tokens of a pass. With a global scope it sees the counts of the passes so far.
        """
        return {
            name: value / (self.micro_batches * passes) for name, value in balance_losses(self.predictor.model).items()
        }


@dataclass(frozen=True)
class StepObjective(ABC):
    """Base of all objectives; its fields are their settings.

    An objective owns the number of forward passes. It divides by the counts of the whole step, so that gradients and
    losses of micro-batches and processes are summed, and draws nothing from the global generator.
    """

    @abstractmethod
    def step(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Forward and backward of a micro-batch; gradients are added to those of the parameters.

        Returns:
            this micro-batch's share of each part of the loss, detached scalars: ``loss``, nats per predicted token, and
            then others by name.
        """
