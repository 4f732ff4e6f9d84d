"""The processes of one run: started by torchrun, or this one alone. Data parallelism is a one-dimensional device mesh.

Everything that is shared is summed, never averaged: each process divides by global counts, so results do not depend
on how a batch was split.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["Ranks", "open_ranks"]


CPU = torch.device("cpu")
_LEAVE = timedelta(minutes=5)


@dataclass(frozen=True)
class Ranks:
    """This process among all. `mesh` is None where there is one process and no process group."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over all processes, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.mesh.get_group())
        return tensor

    def sum_gradients_(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over all processes with one all-reduce per dtype.

        A parameter that got no gradient here (an expert without tokens) takes part with zeros, because it may have
        got one elsewhere. With one process it gets zeros too, so that the optimizer treats it alike.
        """
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
        if self.mesh is None:
            return
        for grads in by_dtype.values():
            flat = self.sum_(torch.cat([g.reshape(-1) for g in grads]))
            for g, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(summed.view_as(g))

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.mesh is not None:
            dist.barrier(group=self.mesh.get_group())


def _leave_together(ranks: Ranks) -> None:
    """Wait until all processes are through with their last collective.

    gloo may abort a process whose peer goes while a collective is still being finished, and a barrier is a collective.
    The store is none.
    """
    store = dist.distributed_c10d._get_default_store()
    store.set(f"collegium-left-{ranks.rank}", "1")
    store.wait([f"collegium-left-{rank}" for rank in range(ranks.world)], _LEAVE)


@contextlib.contextmanager
def open_ranks() -> Iterator[Ranks]:
    """Join the process group that torchrun's environment describes (gloo on CPU, nccl on GPU); alone without one.

    A process group that already exists is used and left open.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    mine = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if cuda else "gloo")
    if not dist.is_initialized():
        yield Ranks(device=device)
        return
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), device, mesh)
        yield ranks
        ranks.barrier()
        _leave_together(ranks)
    finally:
        if mine:
            dist.destroy_process_group()
