"""Balance by a selection bias, with the step rules of the primal-dual theory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from collegium.catalog import method
from collegium.systems.base import Layer, System

__all__ = ["LossFree"]


@method("loss_free", kind="system", paper="Auxiliary-Loss-Free Load Balancing (2024)", arxiv="2408.15664")
@dataclass(frozen=True)
class LossFree(System):
    """Sigmoid scores and a bias that only the selection sees, moved after each step; no loss.

    Formula:
        s = sigmoid(W x), top-K of s + b;  w_e = s_e / sum of s over the chosen
        after optimizer step n: b_e += rate / n^decay sign(mean load - load_e)

    Cost:
        E numbers a layer, and one sum of the counts over the processes a step. The task's gradient is left alone.

    Use it:
        where a loss strong enough to balance costs quality; usual in models of many experts since DeepSeek-V3.

    Not:
        with few tokens a step, where the sign of the error is mostly noise. The rate fits sigmoid scores: another score
        needs another.

    Attributes:
        rate: of the bias in a step, in units of the score.
        error: "sign", or "proportional" to the error over the mean load, which settles instead of swinging.
        decay: of the rate: 0 is constant, 0.5 and 1 are the other schedules of the primal-dual theory (2512.03915).
        centred: keep the mean of the bias at zero (Ling 2.0).
        cap: largest ``|b_e|``, above which the bias is scaled down as a whole; None is no limit.
        load_balancing: coefficient of a small loss beside it, within sequences (DeepSeek-V3: 1e-4); 0 is none.
    """

    rate: float = 1e-3
    error: Literal["sign", "proportional"] = "sign"
    decay: float = 0.0
    centred: bool = False
    cap: float | None = None
    load_balancing: float = 0.0

    def settings(self, layer: Layer) -> dict[str, Any]:
        return {
            "router": {"score": "sigmoid", "transforms": ["bias"], "weigh": {"normalise": True}},
            "balance": {
                "load_balancing": self.load_balancing,
                "scope": "sequence",
                "bias_update_rate": self.rate,
                "bias_update": self.error,
                "bias_decay": self.decay,
                "bias_centred": self.centred,
                "bias_cap": self.cap,
            },
        }
