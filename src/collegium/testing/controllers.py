"""Checks of a controller: an update after each optimizer step that keeps all experts busy without a loss.

What a controller knows is the selection bias, the counts of the step and the number of the step. It may keep nothing
else, because only the bias, a buffer of the router, is saved with the model.

The assignment problem behind (ALF-LB theory, 2025): with fixed scores s the biases b are prices of the experts, and
load minus mean load is a subgradient of

    D(b) = sum_t (sum of the K largest of s_t + b) - K T / E sum_e b_e

A step against it moves a token only from a busier expert to an idler one.

Legend: T tokens, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor

from collegium.routing import Router
from collegium.routing.scores import Sigmoid
from collegium.routing.transforms import SelectionBias
from collegium.testing.running import run_all

__all__ = ["Controller", "MakeController", "check_controller", "controller_checks"]

E, K = 16, 2
STEPS = 300
"""Steps in which a controller must have balanced the load."""
TARGET = 0.05
"""The largest load may then be so much above the mean, as a part of the mean (MaxVio)."""


class Controller(Protocol):
    """What is called once per optimizer step."""

    def update(self, bias: Tensor, counts: Tensor, step: int) -> None:
        """Change ``bias [E]`` in place after step `step`, from 0, in which the experts had ``counts [E]`` tokens."""


MakeController = Callable[[], Controller]
"""Makes a controller, always the same, whose settings suit sigmoid scores: biases beyond 0.5 are not needed."""


def check_controller(make: MakeController) -> None:
    """Run all checks. Raises AssertionError, which names the check."""
    run_all(controller_checks(), make)


def controller_checks() -> list[Callable[[MakeController], None]]:
    """All checks, each to be called with what makes a controller."""
    return [
        check_place,
        check_rest,
        check_direction,
        check_symmetry,
        check_random_state,
        check_resumption,
        check_preference,
        check_frozen_scores,
        check_fresh_batches,
    ]


def skewed_scores(tokens: int, seed: int = 0) -> Tensor:
    """``[T, E]`` sigmoid scores of experts that are liked more and more; at first the load is three times the mean."""
    noise = torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed))
    return (noise + torch.linspace(-1, 1, E)).sigmoid()


def loads(scores: Tensor, bias: Tensor, top_k: int = K) -> Tensor:
    """``[E]`` tokens of each expert."""
    return torch.bincount((scores + bias).topk(top_k).indices.flatten(), minlength=len(bias))


def max_violation(counts: Tensor) -> float:
    """How far the largest load is above the mean, as a part of the mean."""
    return float(counts.max() / counts.float().mean() - 1)


def _random_counts(seed: int) -> Tensor:
    return torch.randint(0, 200, (E,), generator=torch.Generator().manual_seed(seed))


def check_place(make: MakeController) -> None:
    """The bias is changed where it is, and nothing else is."""
    bias, counts = torch.zeros(E), _random_counts(0)
    before, place = counts.clone(), bias.data_ptr()
    assert make().update(bias, counts, 0) is None, "update returns something; it changes the bias in place"  # type: ignore[func-returns-value]
    assert bias.any(), "the bias of an uneven load does not change"
    assert torch.equal(counts, before), "the counts are changed"
    assert (bias.dtype, bias.shape, bias.data_ptr(), bias.requires_grad) == (torch.float32, (E,), place, False)


def check_rest(make: MakeController) -> None:
    """A balanced load changes no bias that the controller may have made, and an empty one changes none at all."""
    settled = torch.tensor([0.25, -0.25, 0.125, -0.125] * (E // 4))
    for counts, begin, what in (
        (torch.full((E,), 9), settled, "equal counts change the bias"),
        (torch.zeros(E, dtype=torch.int64), settled, "empty counts change the bias"),
        (torch.zeros(E, dtype=torch.int64), 7 * settled + 3, "empty counts change a bias from elsewhere"),
    ):
        for step in (0, 3, 1000):
            bias = begin.clone()
            make().update(bias, counts, step)
            assert torch.equal(bias, begin), what


def check_direction(make: MakeController) -> None:
    """Of two experts the busier one never gains on the other, equally busy ones move alike, and the busiest loses
    ground to the idlest."""
    for step in (0, 1, 10, 1000):
        for seed in range(20):
            bias, counts = torch.zeros(E), _random_counts(seed)
            make().update(bias, counts, step)
            order = counts.argsort(descending=True)
            gained, apart = bias[order].diff(), counts[order].diff()
            assert (gained >= -1e-7).all(), "a busier expert gains on an idler one"
            assert (gained[apart == 0].abs() <= 1e-7).all(), "equally busy experts move apart"
            assert bias[order[0]] < bias[order[-1]], "the busiest expert does not lose ground to the idlest"


def check_symmetry(make: MakeController) -> None:
    """Experts that change places take their biases with them: an expert's id means nothing."""
    start = 0.1 * torch.randn(E, generator=torch.Generator().manual_seed(3))
    for seed in range(5):
        order = torch.randperm(E, generator=torch.Generator().manual_seed(seed))
        plain, moved = start.clone(), start[order]
        make().update(plain, _random_counts(seed), 2)
        make().update(moved, _random_counts(seed)[order], 2)
        torch.testing.assert_close(moved, plain[order])


def check_random_state(make: MakeController) -> None:
    """The same counts give the same bias, and the global random state has no part in it."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state, bias, controller = torch.get_rng_state(), torch.zeros(E), make()
        for step in range(5):
            controller.update(bias, _random_counts(step), step)
        assert torch.equal(torch.get_rng_state(), state), "it draws from the global random state"
        found.append(bias)
    assert torch.equal(*found), "the same counts give another bias"


def check_resumption(make: MakeController) -> None:
    """A run that is saved and goes on with a fresh controller ends with the same bits as one that never stopped: all
    that a controller keeps is in the router's buffer."""
    x = torch.randn(256, E, generator=torch.Generator().manual_seed(5))

    def run(router: Router, first: int, last: int) -> Tensor:
        controller, bias = make(), router.e_score_correction_bias
        assert bias is not None
        for step in range(first, last):
            controller.update(bias, router(x).counts(), step)
        return bias

    def fresh() -> Router:
        torch.manual_seed(0)
        router = Router(E, E, K, score=Sigmoid(), transforms=[SelectionBias()])
        router.reset_parameters(std=0.5)
        return router

    whole, first, second = run(fresh(), 0, 40), fresh(), fresh()
    assert run(first, 0, 15).any(), "the bias of an uneven load does not change"
    second.load_state_dict(load(save(first.state_dict())))
    assert torch.equal(run(second, 15, 40), whole), "after a resumption the bias is another; it may keep nothing itself"


def check_preference(make: MakeController) -> None:
    """On fixed scores a token changes from expert e to e' only if e has more tokens than e'."""
    scores, bias, controller = skewed_scores(1024).double(), torch.zeros(E).double(), make()
    moves = preference_moves(scores, bias, controller, K, 150)
    assert moves, "no token ever changes its expert"


def preference_moves(scores: Tensor, bias: Tensor, controller: Controller, top_k: int, steps: int) -> int:
    """Changes of expert in so many steps. Raises AssertionError where a token goes to an expert that is as busy.

    Both in float64, in which no sum of a score and a bias rounds to another one.
    """

    def chosen() -> Tensor:
        return torch.zeros_like(scores).scatter_(1, (scores + bias).topk(top_k).indices, 1.0)

    moves, after = 0, chosen()
    for step in range(steps):
        before, counts = after, after.sum(0)
        controller.update(bias, counts, step)
        after = chosen()
        # [E, E]: tokens that have e no longer and e' instead
        moved = (before - after).clamp(min=0).T @ (after - before).clamp(min=0)
        busier = counts[:, None] > counts
        assert not moved[~busier].any(), f"in step {step} a token changes to an expert that is not idler"
        moves += int(moved.sum())
    return moves


def check_frozen_scores(make: MakeController) -> None:
    """On fixed, skewed scores the load becomes even, and stays so."""
    scores, bias, controller = skewed_scores(4096), torch.zeros(E), make()
    worst = 0.0
    for step in range(STEPS):
        counts = loads(scores, bias)
        if step >= STEPS - 20:
            worst = max(worst, max_violation(counts))
        controller.update(bias, counts, step)
    assert worst < TARGET, f"after {STEPS} steps on fixed scores MaxVio is {worst:.3f}, not below {TARGET}"


def check_fresh_batches(make: MakeController) -> None:
    """On batches that are new in every step, and alike in their skew only, the load becomes even on average."""
    bias, controller, total = torch.zeros(E), make(), torch.zeros(E)
    for step in range(STEPS):
        counts = loads(skewed_scores(1024, seed=step + 1), bias)
        if step >= STEPS - 100:
            total += counts
        controller.update(bias, counts, step)
    found = max_violation(total)
    assert found < TARGET, f"over 100 batches after {STEPS - 100} steps MaxVio is {found:.3f}, not below {TARGET}"
