"""The next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.train.objectives.base import MicroBatch, StepObjective

__all__ = ["NextToken"]


@method("next_token", kind="objective", paper="A Neural Probabilistic Language Model (2003)")
@dataclass(frozen=True)
class NextToken(StepObjective):
    """Cross-entropy of every predicted token, and the layers' balance losses, in one pass.

    Formula:
        loss = mean over tokens of -log p(next token)
          + sum of the balance losses, each the mean over layers

    Cost:
        one forward and one backward pass.

    Use it:
        unless a method says otherwise.

    Not:
        with experts by chance (system `thor`), which nothing then teaches to agree.
    """

    def step(self, batch: MicroBatch) -> dict[str, Tensor]:
        with batch.routed():
            with batch.autocast():
                loss = batch.predictor.mean_loss(batch.inputs, batch.predicted)
            balance = batch.balance()
            torch.stack([loss, *balance.values()]).sum().backward()
        return {name: value.detach() for name, value in {"loss": loss, **balance}.items()}
