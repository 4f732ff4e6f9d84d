"""`LoadStats`: accumulation, idempotent sync, telemetry; and two processes against one that holds both halves."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from collegium.balance import LoadStats, sync_all
from collegium.errors import ConfigError


def test_counts_add_up_over_micro_batches_and_reset() -> None:
    stats = LoadStats(3)
    assert stats.sync().tolist() == [0, 0, 0]
    stats.add(torch.tensor([1, 2, 3]), 3)
    stats.add(torch.tensor([1, 0, 0]), torch.tensor(1))
    assert stats.sync().tolist() == [2, 2, 3]
    assert stats.sync().tolist() == [2, 2, 3]
    stats.add(torch.tensor([0, 0, 1]), 1)
    assert stats.sync().tolist() == [2, 2, 4]
    assert stats.tokens.item() == 5
    assert stats.token_weight == 1.0
    stats.reset()
    assert stats.sync().tolist() == [0, 0, 0]


def test_earlier_answers_are_not_changed_by_later_ones() -> None:
    stats = LoadStats(2)
    stats.add(torch.tensor([1, 2]))
    first = stats.sync()
    stats.add(torch.tensor([5, 5]))
    stats.sync()
    assert first.tolist() == [1, 2]


def test_max_violation_and_dead_experts() -> None:
    stats = LoadStats(4)
    assert math.isnan(stats.max_violation())
    assert stats.dead() == 4
    stats.add(torch.tensor([6, 2, 0, 0]))
    assert stats.max_violation() == pytest.approx(2)
    assert stats.dead() == 2


def test_counts_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 experts"):
        LoadStats(4).add(torch.tensor([1, 2]))


def test_layers_of_different_sizes_sync_together() -> None:
    a, b, untouched = LoadStats(2), LoadStats(3), LoadStats(5)
    a.add(torch.tensor([1, 2]), 3)
    b.add(torch.tensor([3, 4, 5]), 12)
    sync_all([a, b, untouched])
    assert (a.sync().tolist(), b.sync().tolist()) == ([1, 2], [3, 4, 5])
    assert (a.tokens.item(), b.tokens.item(), untouched.tokens.item()) == (3, 12, 0)


WORKER = """
import sys
import torch
import torch.distributed as dist
from collegium.balance import LoadStats, load_balancing_loss
from collegium.routing.record import Routing

E, K = 5, 2

def loss_of(x, weight, stats):
    probs = (x @ weight.T).softmax(-1)
    value, index = probs.topk(K)
    routing = Routing.from_topk(index, value, E, probs=probs)
    stats.add(routing.counts(), routing.num_tokens)
    return load_balancing_loss(routing, scope="global", stats=stats)

generator = torch.Generator().manual_seed(0)
x = torch.randn(30, 8, generator=generator)
start = torch.randn(E, 8, generator=generator)
halves = [x[:12], x[12:]]  # unequal on purpose

alone = start.clone().requires_grad_()
loss = loss_of(x, alone, LoadStats(E))
loss.backward()

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
mine = start.clone().requires_grad_()
stats = LoadStats(E)
share = loss_of(halves[dist.get_rank()], mine, stats)
assert stats.sync().equal(stats.sync())
share.backward()
dist.all_reduce(mine.grad)
torch.testing.assert_close(mine.grad / 2, alone.grad)
value = share.detach().clone()
dist.all_reduce(value)
torch.testing.assert_close(value / 2, loss.detach())

counts = stats.sync().clone()
assert counts.sum().item() == 30 * K and stats.tokens.item() == 30

# a second micro-batch: every process sees the pooled counts of both, and no count enters twice
loss_of(halves[dist.get_rank()], mine, stats)
assert stats.sync().equal(2 * counts)

# a group of one process counts its own tokens only
own = [dist.new_group([r]) for r in range(2)][dist.get_rank()]
local = LoadStats(E, own)
loss_of(halves[dist.get_rank()], mine, local)
assert local.sync().sum().item() == len(halves[dist.get_rank()]) * K
dist.destroy_process_group()
"""


def test_two_processes_give_the_gradient_of_one_that_holds_both_halves(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "store"), str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, worker in enumerate(workers):
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, f"process {rank}:\n{errors}"
