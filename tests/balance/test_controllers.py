"""`LossFreeBias`: its rules, what assignment theory says about them, and that they balance a frozen router."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from collegium.balance import LossFreeBias
from collegium.errors import ConfigError


def frozen_scores(T: int = 2048, E: int = 16, seed: int = 0) -> Tensor:
    """Sigmoid scores with skewed means."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(T, E, generator=generator) + torch.linspace(-1, 1, E)).sigmoid()


def choose(scores: Tensor, bias: Tensor, k: int = 2) -> Tensor:
    return (scores + bias).topk(k).indices


def counts_of(index: Tensor, E: int) -> Tensor:
    return torch.bincount(index.flatten(), minlength=E)


def max_violation(counts: Tensor) -> float:
    return float(counts.max() / counts.float().mean() - 1)


@pytest.mark.parametrize(
    "rule",
    [
        LossFreeBias(rate=5e-3),
        LossFreeBias(rate=5e-3, centred=True),
        LossFreeBias(rate=0.03, error="proportional"),
        LossFreeBias(rate=0.15, error="proportional", decay=0.5),
    ],
    ids=str,
)
def test_every_rule_balances_frozen_scores(rule: LossFreeBias) -> None:
    scores, bias = frozen_scores(), torch.zeros(16)
    start = max_violation(counts_of(choose(scores, bias), 16))
    for step in range(300):
        rule.update(bias, counts_of(choose(scores, bias), 16), step)
    assert start > 1
    assert max_violation(counts_of(choose(scores, bias), 16)) < 0.1


def test_centred_bias_keeps_mean_zero_and_changes_no_choice() -> None:
    scores, plain, centred = frozen_scores().double(), torch.zeros(16).double(), torch.zeros(16).double()
    for step in range(50):
        LossFreeBias(rate=1e-2).update(plain, counts_of(choose(scores, plain), 16), step)
        LossFreeBias(rate=1e-2, centred=True).update(centred, counts_of(choose(scores, centred), 16), step)
        assert abs(centred.mean().item()) < 1e-12
        # a constant added to all experts moves none of them past another
        assert choose(scores, plain).equal(choose(scores, centred))
    assert abs(plain.mean().item()) > 1e-3


def test_the_sign_rule_is_deepseeks() -> None:
    bias = torch.tensor([0.1, 0.0, -0.1])
    LossFreeBias(rate=1e-3).update(bias, torch.tensor([5, 3, 1]), 0)
    assert bias.tolist() == pytest.approx([0.099, 0.0, -0.099])


def test_dual_objective_never_rises_for_a_small_proportional_step() -> None:
    # ALF-LB: with frozen scores the update is a subgradient step on a convex dual of the assignment problem
    scores = frozen_scores(T=256, E=8)[:, :8].double()
    bias = torch.zeros(8).double()
    mean = 256 * 2 / 8
    last = float("inf")
    for step in range(400):
        dual = ((scores + bias).topk(2).values.sum() - mean * bias.sum()).item()
        assert dual <= last + 1e-9
        last = dual
        LossFreeBias(rate=2e-3, error="proportional").update(bias, counts_of(choose(scores, bias), 8), step)


def test_tokens_only_ever_move_from_a_busier_expert_to_an_idler_one() -> None:
    scores, bias = frozen_scores(T=256, E=8).double(), torch.zeros(8).double()
    moves = 0
    for step in range(100):
        before = choose(scores, bias, k=1).squeeze(1)
        counts = counts_of(before, 8)
        LossFreeBias(rate=2e-2, error="proportional").update(bias, counts, step)
        after = choose(scores, bias, k=1).squeeze(1)
        moved = before != after
        assert (counts[before[moved]] > counts[after[moved]]).all()
        moves += int(moved.sum())
    assert moves > 50


def test_decay_shrinks_the_step() -> None:
    counts = torch.tensor([3, 1])
    sizes = []
    for step in (0, 3):
        bias = torch.zeros(2)
        LossFreeBias(rate=0.1, decay=0.5).update(bias, counts, step)
        sizes.append(bias.abs().max().item())
    assert sizes == pytest.approx([0.1, 0.05])


def test_cap_scales_the_whole_bias() -> None:
    bias = torch.tensor([0.5, -0.5, 0.25, -0.25])
    LossFreeBias(rate=1e-6, centred=True, cap=0.1).update(bias, torch.tensor([1, 2, 3, 4]), 0)
    assert bias.abs().max().item() <= 0.1 + 1e-6
    assert abs(bias.mean().item()) < 1e-7
    assert bias.argsort().tolist() == [1, 3, 2, 0]
    small = torch.tensor([0.05, -0.05])
    LossFreeBias(rate=1e-3, cap=0.1).update(small, torch.tensor([1, 1]), 0)
    assert small.tolist() == pytest.approx([0.05, -0.05])


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"decay": -1}, {"cap": 0.0}, {"error": "vibes"}])
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError):
        LossFreeBias(**settings)
