"""Controllers: updates after each optimizer step that keep all experts busy without a loss.

Legend: E experts.

A controller is a frozen dataclass of settings with one method, ``update(bias, counts, step)``, which changes the
selection bias in place. The bias is the router's float32 buffer, so it is saved with the model and has no gradient.
"""

from __future__ import annotations

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
    """``b_e += u * sign(mean load - load_e)``: an expert with too many tokens becomes harder to select.

    The bias enters selection only, never the combine weight. `rate` must fit the scale of the scores: 1e-3 suits
    sigmoid scores; softmax scores over many experts are near 1/E, where such a step oscillates.

    Attributes:
        rate: u > 0, in units of the selection score.
        error: "sign" as in DeepSeek-V3, whose limit cycle has amplitude ~u; "proportional" uses the load error over
            the mean load, the dual step of the assignment problem, which settles.
        decay: the step size is ``rate / n ** decay`` with n = 1, 2, ... the optimizer step; 0, 0.5 and 1 are the
            schedules that ALF-LB analyses (constant, 1/sqrt(n), 1/n).
        centred: keep the mean of the bias at zero, as Ling 2.0 (2025) does.
        cap: largest allowed ``|b_e|``; a larger bias is scaled down as a whole, which keeps its order and its zero
            mean. None means no limit.

    Raises:
        ConfigError: a setting is out of range.
    """

    rate: float = 1e-3
    error: Literal["sign", "proportional"] = "sign"
    decay: float = 0.0
    centred: bool = False
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.rate <= 0 or self.decay < 0 or (self.cap is not None and self.cap <= 0):
            raise ConfigError(f"rate and cap must be above 0 and decay at least 0: {self}")
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
        bias += change * (mean > 0) * (self.rate / (step + 1) ** self.decay)
        if self.centred:
            # the mean of the changes is zero only up to rounding, which would add up over a run
            bias -= bias.mean()
        if self.cap is not None:
            bias *= self.cap / bias.abs().max().clamp(min=self.cap)
