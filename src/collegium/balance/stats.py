"""`LoadStats`: how many assignments each expert of one layer got in the current optimizer step, on all processes.

Legend: E experts, R processes.

Every micro-batch adds its counts; `sync` sums what is new over the process group and keeps it; `reset` starts the next
optimizer step. Losses and controllers read nothing else, so both see the same pooled counts. With one process `sync`
communicates nothing and is the identity, so everything that uses it is testable without a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from collegium.errors import ConfigError

__all__ = ["LoadStats", "sync_all"]


class LoadStats:
    """Counts of one layer over gradient accumulation and a process group.

    Args:
        num_experts: E.
        group: the processes whose tokens count together; None means all of them (or only this one, where
            `torch.distributed` is not initialised).
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup | None = None) -> None:
        self.num_experts = num_experts
        self.group = group
        self.reset()

    def reset(self) -> None:
        """Forget everything; called after each optimizer step."""
        # both are [E + 1]; the last entry counts tokens, so that one all-reduce carries everything
        self._pending: Tensor | None = None
        self._total: Tensor | None = None
        self._token_weight: Tensor | None = None

    def add(self, counts: Tensor, tokens: Tensor | int = 0) -> None:
        """Add one micro-batch of this process.

        Args:
            counts: ``[E]`` int64 assignments per expert, padding left out.
            tokens: how many tokens made them, padding left out; needed by `tokens` and `token_weight` only.

        Raises:
            ConfigError: `counts` is not ``[E]``.
        """
        if counts.shape != (self.num_experts,):
            raise ConfigError(f"counts are {tuple(counts.shape)}, this layer has {self.num_experts} experts")
        tokens = torch.as_tensor(tokens, device=counts.device).reshape(1)
        fresh = torch.cat([counts.detach().long(), tokens.long()])
        self._pending = fresh if self._pending is None else self._pending + fresh

    def sync(self) -> Tensor:
        """``[E]`` int64: all counts since `reset`, over all processes and micro-batches.

        A collective call: every process of the group makes it, having added equally often. Calling it again before
        the next `add` communicates nothing and gives the same answer.
        """
        sync_all([self])
        if self._total is None:
            return torch.zeros(self.num_experts, dtype=torch.int64)
        return self._total[:-1]

    @property
    def tokens(self) -> Tensor:
        """Scalar int64: tokens since `reset`, over all processes. Collective, as `sync`."""
        sync_all([self])
        return torch.zeros((), dtype=torch.int64) if self._total is None else self._total[-1]

    @property
    def token_weight(self) -> Tensor | float:
        """This process's tokens over the mean of all processes', for what the latest `sync` brought in.

        A mean over local tokens, times this, averages over processes to the mean over all tokens even where processes
        hold different numbers of tokens (padding). It is 1 with one process. Collective, as `sync`.
        """
        sync_all([self])
        return 1.0 if self._token_weight is None else self._token_weight

    def max_violation(self) -> float:
        """MaxVio, ``max(counts) / mean(counts) - 1``: 0 at balance, E-1 if one expert gets all, NaN before any count.

        Collective, as `sync`. Source: Auxiliary-Loss-Free Load Balancing (2024).
        """
        counts = self.sync().double()
        return float(counts.max() / counts.mean() - 1)

    def dead(self) -> int:
        """How many experts got no assignment. Collective, as `sync`."""
        return int((self.sync() == 0).sum())


def sync_all(stats: Sequence[LoadStats]) -> None:
    """`LoadStats.sync` of several layers with a single all-reduce per process group and device."""
    waiting: dict[tuple[dist.ProcessGroup | None, torch.device], list[LoadStats]] = {}
    for one in stats:
        if one._pending is not None:
            waiting.setdefault((one.group, one._pending.device), []).append(one)
    for (group, _), members in waiting.items():
        local = [one._pending for one in members if one._pending is not None]
        shared = torch.cat(local)
        size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        if size > 1:
            dist.all_reduce(shared, group=group)
        for one, mine, all_ in zip(members, local, shared.split([m.numel() for m in local]), strict=True):
            one._total = all_.clone() if one._total is None else one._total + all_
            one._token_weight = mine[-1] * size / all_[-1].clamp(min=1) if size > 1 else None
            one._pending = None
