"""Keeping all experts busy: load statistics, losses, and after-step controllers."""

from __future__ import annotations

from collegium.balance.config import Balance, BalanceConfig
from collegium.balance.controllers import LossFreeBias
from collegium.balance.losses import load_balancing_loss, router_z_loss
from collegium.balance.stats import LoadStats, sync_all

__all__ = [
    "Balance",
    "BalanceConfig",
    "LoadStats",
    "LossFreeBias",
    "load_balancing_loss",
    "router_z_loss",
    "sync_all",
]
