"""`BalanceConfig`: the balancing settings of one layer as data, and `Balance`, which carries them out."""

from __future__ import annotations

from typing import Any, Literal

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from collegium.balance.controllers import LossFreeBias
from collegium.balance.extra import RoutingLoss, WeightLoss
from collegium.balance.losses import load_balancing_loss, router_z_loss
from collegium.balance.stats import LoadStats
from collegium.catalog import methods
from collegium.named import one_named, snake
from collegium.routing.record import Routing

__all__ = ["Balance", "BalanceConfig"]


class BalanceConfig(BaseModel):
    """How one layer keeps its experts busy. All parts can be on together; a coefficient or rate of 0 is off.

    Attributes:
        load_balancing: coefficient of `load_balancing_loss`, whose value at balance is 1.
        scope: over which tokens that loss counts: "sequence", "micro_batch" or "global" (all processes, and the
            micro-batches of the optimizer step so far).
        z_loss: coefficient of `router_z_loss` (1e-3 in ST-MoE).
        bias_update_rate, bias_update, bias_decay, bias_centred, bias_cap: `LossFreeBias` as rate, error, decay,
            centred, cap; needs a router with a selection bias.
        losses: more losses, of kind "routing_loss" or "weight_loss", as ``{name: {setting: value}}``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    load_balancing: float = Field(default=0.01, ge=0)
    scope: Literal["sequence", "micro_batch", "global"] = "global"
    z_loss: float = Field(default=0.0, ge=0)
    bias_update_rate: float = Field(default=0.0, ge=0)
    bias_update: Literal["sign", "proportional"] = "sign"
    bias_decay: float = Field(default=0.0, ge=0)
    bias_centred: bool = False
    bias_cap: float | None = Field(default=None, gt=0)
    losses: tuple[dict[str, Any] | str, ...] = ()

    @field_validator("losses")
    @classmethod
    def _known(cls, losses: tuple[Any, ...]) -> tuple[Any, ...]:
        for one in losses:
            _loss(one)
        return losses


def _loss(said: Any) -> RoutingLoss | WeightLoss:
    """The loss that plain data names."""
    name = said if isinstance(said, str) else next(iter(said), "")
    weights = {one.name for one in methods("weight_loss")}
    found: RoutingLoss | WeightLoss = one_named("weight_loss" if name in weights else "routing_loss", said, "losses")
    return found


class Balance:
    """The balancing of one layer: counts, losses and controller.

    Args:
        config: what is on.
        num_experts: E of the layer.
        group: the processes whose tokens count together, see `LoadStats`.
    """

    def __init__(self, config: BalanceConfig, num_experts: int, group: dist.ProcessGroup | None = None) -> None:
        self.config = config
        self.stats = LoadStats(num_experts, group)
        found = [_loss(one) for one in config.losses]
        for one in found:
            one.check(num_experts)
        self.routing_losses = [one for one in found if isinstance(one, RoutingLoss)]
        self.weight_losses = [one for one in found if isinstance(one, WeightLoss)]
        self.controller: LossFreeBias | None = None
        if config.bias_update_rate:
            self.controller = LossFreeBias(
                rate=config.bias_update_rate,
                error=config.bias_update,
                decay=config.bias_decay,
                centred=config.bias_centred,
                cap=config.bias_cap,
            )

    @property
    def needs_logits(self) -> bool:
        """Whether the router must keep its logits."""
        return self.config.z_loss > 0 or any(one.needs_logits for one in self.routing_losses)

    def record(self, routing: Routing) -> None:
        """Count one training forward."""
        tokens = routing.num_tokens if routing.valid is None else routing.valid.sum()
        self.stats.add(routing.counts("assigned"), tokens)

    def losses(
        self, routing: Routing, sequence: Tensor | None, router: nn.Module, experts: Any, key: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """Weighted losses of one recorded forward, by name; those with coefficient 0 are absent.

        Args:
            routing: what `record` was given last.
            sequence: ``[T]`` sequence or document of each token, needed by scope "sequence".
            router, experts: of the layer, for losses on weights.
            key: for random choices.
        """
        found = {}
        if self.config.load_balancing:
            stats = self.stats if self.config.scope == "global" else None
            found["load_balancing"] = self.config.load_balancing * load_balancing_loss(
                routing, scope=self.config.scope, stats=stats, sequence=sequence
            )
        if self.config.z_loss:
            found["z_loss"] = self.config.z_loss * router_z_loss(routing)
        pooled = self.stats if self.config.scope == "global" else None
        for loss in self.routing_losses:
            if loss.coefficient:
                found[snake(loss)] = loss.coefficient * loss(routing, pooled)
        for weight_loss in self.weight_losses:
            if weight_loss.coefficient:
                found[snake(weight_loss)] = weight_loss.coefficient * weight_loss(router, experts, key)
        return found
