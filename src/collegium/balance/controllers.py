"""Controllers: updates after each optimizer step that keep all experts busy without a loss.

Legend: E experts.

A controller is a frozen dataclass of settings with one method, ``update(bias, counts, step)``, which changes the
selection bias in place. The bias is the router's float32 buffer, so it is saved with the model and has no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.errors import ConfigError

__all__ = ["LossFreeBias"]


@method("loss_free_bias", kind="controller", paper="Auxiliary-Loss-Free Load Balancing (2024)", arxiv="2408.15664")
@method("primal_dual_bias", kind="controller", paper="ALF-LB theory (2025)", arxiv="2512.03915")
@dataclass(frozen=True)
class LossFreeBias:
    """An expert with too many tokens becomes harder to select, one with too few easier.

    The bias enters selection only, never the combine weight. `rate` must fit the scale of the scores: 1e-3 suits
    sigmoid scores; softmax scores over many experts are near 1/E, where such a step oscillates.

    Formula:
        b_e += rate / n^decay sign(mean load - load_e),
          or (mean load - load_e) / mean load in place of the sign
        after optimizer step n = 1, 2, ..., load of the whole step over all processes

    Cost:
        E additions a layer and step, and one sum of the counts over the processes; no gradient.

    Use it:
        where a loss strong enough to balance costs quality. "proportional", or a decay, settles on scores that stay; a
        constant rate keeps up with those that drift.

    Not:
        where loads must be even from the first step, or with few tokens a step, whose errors are mostly noise.

    Attributes:
        rate: u > 0, in units of the selection score.
        error: "sign" as in DeepSeek-V3, whose limit cycle has amplitude ~u; "proportional" uses the load error over
            the mean load, the dual step of the assignment problem, which settles.
        decay: the step size is ``rate / n ** decay`` with n = 1, 2, ... the optimizer step; 0, 0.5 and 1 are the
            schedules that ALF-LB analyses (constant, 1/sqrt(n), 1/n).
        centred: keep the mean of the bias at zero, as Ling 2.0 (2025) does.
        cap: largest allowed ``|b_e|``; a larger bias is scaled down as a whole, which keeps its order and its zero
            mean. None means no limit. One that binds gives up the balance, and tokens may then move to busier experts.

    Raises:
        ConfigError: a setting is out of range.
    """

    rate: float = 1e-3
    error: Literal["sign", "proportional"] = "sign"
    decay: float = 0.0
    centred: bool = False
    cap: float | None = None

    def __post_init__(self) -> None:
        positive = [self.rate] if self.cap is None else [self.rate, self.cap]
        if not (all(0 < one < math.inf for one in positive) and 0 <= self.decay < math.inf):
            raise ConfigError(f"rate and cap must be above 0, decay at least 0, and all finite: {self}")
        if self.error not in ("sign", "proportional"):
            raise ConfigError(f"unknown error rule {self.error!r}; there are sign and proportional")

    @torch.no_grad()
    def update(self, bias: Tensor, counts: Tensor, step: int) -> None:
        """One step, in place. Nothing changes if no token was counted.

        Args:
            bias: ``[E]`` float32 selection bias.
            counts: ``[E]`` assignments of the whole step, over all processes and micro-batches.
            step: optimizer step, from 0.
        """
        load = counts.to(bias)
        mean = load.mean()
        change = (mean - load).sign() if self.error == "sign" else (mean - load) / mean.clamp(min=1e-20)
        if self.centred:
            change = change - change.mean()
        moved = bias + change * (self.rate / (step + 1) ** self.decay)
        if self.centred:
            # the mean of the changes is zero only up to rounding, which would add up over a run
            moved = moved - moved.mean()
        if self.cap is not None:
            moved = moved * (self.cap / moved.abs().max().clamp(min=self.cap))
        # without a look at the counts, for which a GPU would have to wait
        bias.copy_(torch.where(mean > 0, moved, bias))
