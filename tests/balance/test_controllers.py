"""`LossFreeBias`: its rules by hand; what they promise for balance is in `test_controller_contract`."""

from __future__ import annotations

import pytest
import torch

from collegium.balance import LossFreeBias
from collegium.errors import ConfigError
from collegium.testing.controllers import loads, skewed_scores


def test_centred_bias_keeps_mean_zero_and_changes_no_choice() -> None:
    scores, plain, centred = skewed_scores(512).double(), torch.zeros(16).double(), torch.zeros(16).double()
    for step in range(50):
        LossFreeBias(rate=1e-2).update(plain, loads(scores, plain), step)
        LossFreeBias(rate=1e-2, centred=True).update(centred, loads(scores, centred), step)
        assert abs(centred.mean().item()) < 1e-12
        # a constant added to all experts moves none of them past another
        assert (scores + plain).topk(2).indices.equal((scores + centred).topk(2).indices)
    assert abs(plain.mean().item()) > 1e-3


def test_the_sign_rule_is_deepseeks() -> None:
    bias = torch.tensor([0.1, 0.0, -0.1])
    LossFreeBias(rate=1e-3).update(bias, torch.tensor([5, 3, 1]), 0)
    assert bias.tolist() == pytest.approx([0.099, 0.0, -0.099])


def test_the_proportional_rule_takes_the_error_over_the_mean() -> None:
    bias = torch.tensor([0.1, 0.0, -0.1])
    LossFreeBias(rate=3e-3, error="proportional").update(bias, torch.tensor([5, 3, 1]), 0)
    assert bias.tolist() == pytest.approx([0.098, 0.0, -0.098])


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


@pytest.mark.parametrize("centred", [False, True])
def test_without_tokens_not_even_a_bias_from_elsewhere_is_centred_or_capped(centred: bool) -> None:
    bias = torch.tensor([0.5, 0.25, 0.0])
    rule = LossFreeBias(centred=centred, cap=0.1)
    rule.update(bias, torch.zeros(3), 0)
    assert bias.tolist() == [0.5, 0.25, 0.0]
    rule.update(bias, torch.ones(3), 1)
    assert bias.abs().max().item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rate": 0.0}, "rate and cap must be above 0.*rate=0.0"),
        ({"rate": float("nan")}, "all finite.*rate=nan"),
        ({"decay": -1}, "decay at least 0.*decay=-1"),
        ({"decay": float("inf")}, "all finite.*decay=inf"),
        ({"cap": 0.0}, "cap must be above 0.*cap=0.0"),
        ({"error": "vibes"}, "unknown error rule 'vibes'; there are sign and proportional"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LossFreeBias(**settings)
