"""What every controller promises, and what assignment theory says about the step rules of `LossFreeBias`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from collegium.balance import LossFreeBias
from collegium.catalog import methods
from collegium.testing import Controller, check_controller, controller_checks
from collegium.testing import controllers as suite
from collegium.testing.controllers import loads, max_violation, preference_moves, skewed_scores

E = 16
RULES = {
    "sign": LossFreeBias(rate=1e-3),
    "constant": LossFreeBias(rate=0.02, error="proportional"),
    "u / sqrt(n)": LossFreeBias(rate=0.1, error="proportional", decay=0.5),
    "u / n": LossFreeBias(rate=0.3, error="proportional", decay=1.0),
    "sign, u / sqrt(n)": LossFreeBias(rate=0.02, decay=0.5),
    "centred": LossFreeBias(rate=1e-3, centred=True),
    "capped": LossFreeBias(rate=0.02, error="proportional", cap=0.5),
}
"""The step rules that the theory analyses, with what others add to them."""

CATALOGUED = {one.obj.__name__: one.obj for one in methods("controller")}
MAKERS: dict[str, Callable[[], Controller]] = {
    **{f"{name}, as it is": cls for name, cls in CATALOGUED.items()},
    **{name: lambda rule=rule: rule for name, rule in RULES.items() if rule != LossFreeBias()},
}


@pytest.mark.parametrize("check", controller_checks(), ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_contract(make: Callable[[], Controller], check: Callable[[Callable[[], Controller]], None]) -> None:
    check(make)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("sign", 0.9e-3, 2.1e-3),
        ("centred", 0.9e-3, 2.1e-3),
        ("sign, u / sqrt(n)", 1e-3, 3e-3),  # a step is 0.02 / 20 by then
        ("constant", 0, 5e-4),
        ("u / sqrt(n)", 0, 2e-4),
        ("u / n", 0, 2e-4),
    ],
)
def test_the_sign_rule_ends_in_a_cycle_of_a_step_and_the_proportional_rules_at_rest(
    name: str, low: float, high: float
) -> None:
    scores, bias, seen = skewed_scores(2048), torch.zeros(E), []
    for step in range(360):
        RULES[name].update(bias, loads(scores, bias), step)
        seen.append(bias.clone())
    least, most = torch.stack(seen[-40:]).aminmax(dim=0)
    assert low <= float((most - least).max()) <= high


SEEDS = st.integers(0, 10_000)


def drawn(seed: int, T: int, E: int, spread: float = 1.0) -> Tensor:
    """``[T, E]`` float64 sigmoid scores with skewed means."""
    noise = torch.randn(T, E, generator=torch.Generator().manual_seed(seed))
    return (noise + torch.linspace(-spread, spread, E)).double().sigmoid()


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(2, 10), st.data())
def test_the_dual_objective_never_rises_for_a_small_proportional_step(seed: int, E: int, data: st.DataObject) -> None:
    # with fixed scores the update is a subgradient step on the convex dual of the assignment problem
    K = data.draw(st.integers(1, E - 1))
    T = 16 * E
    scores, bias, mean = drawn(seed, T, E), torch.zeros(E).double(), T * K / E
    rule = LossFreeBias(rate=2e-5 * mean, error="proportional")
    dual = []
    for step in range(100):
        dual.append(((scores + bias).topk(K).values.sum() - mean * bias.sum()).item())
        rule.update(bias, loads(scores, bias, K), step)
    assert all(after <= before + 1e-10 for before, after in pairwise(dual))
    assert dual[-1] < dual[0]


@settings(max_examples=10, deadline=None)
@given(SEEDS, st.integers(2, 12), st.data())
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_tokens_only_ever_move_from_a_busier_expert_to_an_idler_one(
    rule: LossFreeBias, seed: int, E: int, data: st.DataObject
) -> None:
    K = data.draw(st.integers(1, E - 1))
    preference_moves(drawn(seed, 96, E, spread=0.5), torch.zeros(E).double(), rule, K, 30)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=64), st.integers(0, 10**6))
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_whatever_the_counts_a_busier_expert_gains_nothing(rule: LossFreeBias, counts: list[int], step: int) -> None:
    bias = torch.zeros(len(counts))
    rule.update(bias, torch.tensor(counts), step)
    assert bias.isfinite().all()
    gained = bias[torch.tensor(counts).argsort(descending=True)].diff()
    assert (gained >= -1e-6 * bias.abs().max()).all()


def test_a_cap_that_binds_is_kept_and_gives_up_the_balance() -> None:
    scores, bias, rule = skewed_scores(4096), torch.zeros(E), LossFreeBias(rate=5e-3, cap=0.05)
    start = max_violation(loads(scores, bias))
    for step in range(100):
        rule.update(bias, loads(scores, bias), step)
        assert bias.abs().max() <= 0.05 + 1e-7
    assert suite.TARGET < max_violation(loads(scores, bias)) < start


# Controllers that break the contract


@dataclass(frozen=True)
class Backwards:
    """Gives more to those who have."""

    def update(self, bias: Tensor, counts: Tensor, step: int) -> None:
        bias += 1e-3 * (counts - counts.float().mean()).sign()


@dataclass(frozen=True)
class Elsewhere:
    """Leaves the bias as it is, and returns another."""

    def update(self, bias: Tensor, counts: Tensor, step: int) -> Tensor:
        return bias + 1e-3 * (counts.float().mean() - counts).sign()


@dataclass(frozen=True)
class Forgetful:
    """Draws every bias towards zero, tokens or not."""

    def update(self, bias: Tensor, counts: Tensor, step: int) -> None:
        LossFreeBias(rate=5e-3).update(bias, counts, step)
        bias *= 0.98


@dataclass(frozen=True)
class Partial:
    """Likes experts with low numbers."""

    def update(self, bias: Tensor, counts: Tensor, step: int) -> None:
        LossFreeBias().update(bias, counts * torch.linspace(1, 1.2, len(counts)), step)


@dataclass(frozen=True)
class Noisy:
    """Draws from the global random state."""

    def update(self, bias: Tensor, counts: Tensor, step: int) -> None:
        LossFreeBias(rate=1e-3 * float(1 + torch.rand(()))).update(bias, counts, step)


@dataclass
class Heavy:
    """Has momentum, and keeps it itself."""

    velocity: Tensor | None = field(default=None)

    def update(self, bias: Tensor, counts: Tensor, step: int) -> None:
        error = (counts.float().mean() - counts) / counts.float().mean().clamp(min=1)
        self.velocity = error if self.velocity is None else 0.5 * self.velocity + error
        bias += 5e-3 * self.velocity


@pytest.mark.parametrize(
    ("make", "check", "words"),
    [
        (Elsewhere, suite.check_place, "returns something"),
        (Forgetful, suite.check_rest, "equal counts change the bias"),
        (lambda: LossFreeBias(centred=True, rate=1e-9), suite.check_frozen_scores, "MaxVio is"),
        (Backwards, suite.check_direction, "busier expert gains"),
        (Partial, suite.check_symmetry, "not close"),
        (Noisy, suite.check_random_state, "global random state"),
        (Heavy, suite.check_resumption, "may keep nothing itself"),
        (Forgetful, suite.check_preference, "not idler"),
        (Heavy, suite.check_preference, "not idler"),
        (lambda: LossFreeBias(rate=5e-3), suite.check_frozen_scores, "MaxVio is 0.0"),
        (lambda: LossFreeBias(cap=0.05), suite.check_fresh_batches, "MaxVio is"),
        (lambda: LossFreeBias(rate=0.02, decay=1.0), suite.check_fresh_batches, "MaxVio is"),
    ],
    ids=lambda one: one if isinstance(one, str) else getattr(one, "__name__", None),
)
def test_a_controller_that_breaks_the_contract_is_told_so(
    make: Callable[[], Controller], check: Callable[[Callable[[], Controller]], None], words: str
) -> None:
    with pytest.raises(AssertionError, match=words):
        check(make)


def test_all_checks_in_one_call_name_the_one_that_fails() -> None:
    with pytest.raises(AssertionError, match="check_rest: equal counts"):
        check_controller(Forgetful)
