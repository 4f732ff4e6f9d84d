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

    Attributes:
        rate, error, decay, centred, cap: see `LossFreeBias`; the theory's rules are ``error`` with ``decay`` 0
            (constant), 0.5 (``u / sqrt(n)``) and 1 (``u / n``).
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
