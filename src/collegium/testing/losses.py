"""A check of losses that keep the experts busy.

Legend: T tokens, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from collegium.balance.extra import RoutingLoss
from collegium.routing import Routing

__all__ = ["check_balance_loss"]

T, E, K = 64, 8, 2


def check_balance_loss(make: Callable[[int], RoutingLoss]) -> None:
    """A loss that says ``is_balance`` is a finite float32 scalar, 1 at even load, that grows with skew, and whose
    gradient lowers the probability of an overloaded expert; padding does not count.

    Args:
        make: makes a loss for so many experts, with settings that let it tell some of them apart.

    Raises:
        AssertionError: says what does not hold.
    """
    loss = make(E)
    loss.check(E)
    values = [loss(_routing(_probs(share), share), None) for share in (0.0, 0.3, 0.6, 0.9)]
    assert all(value.shape == () and value.dtype == torch.float32 for value in values), "it is no float32 scalar"
    numbers = [value.item() for value in values]
    assert abs(numbers[0] - 1) < 1e-5, f"at even load it is {numbers[0]}, not 1"
    assert all(a < b for a, b in pairwise(numbers)), f"it does not grow with skew: {numbers}"

    logits = _probs(0.6).clamp(min=1e-6).log().requires_grad_()
    loss(_routing(logits.softmax(-1), 0.6), None).backward()
    assert logits.grad is not None, "no gradient reaches the probabilities"
    gradient = logits.grad.sum(0)
    assert gradient[0] > gradient[K:].max(), "descent does not lower an overloaded expert against the others"

    padded = loss(_routing(_probs(0.6), 0.6, padding=True), None).item()
    assert abs(padded - numbers[2]) < 1e-5, f"padding changes it from {numbers[2]} to {padded}"


def _crowded(share: float) -> Tensor:
    return torch.arange(T)[:, None] < share * T


def _probs(share: float) -> Tensor:
    """``[T, E]``: this share of the tokens is sure of the first K experts, the others of none."""
    sure = (torch.arange(E) < K) / K
    return torch.where(_crowded(share), sure, torch.full((E,), 1 / E))


def _routing(probs: Tensor, share: float, padding: bool = False) -> Routing:
    """This share of the tokens goes to the first K experts, the others to all in turn; with T tokens of padding that
    go to the last experts."""
    even = (torch.arange(T)[:, None] + torch.tensor([0, E // 2])) % E
    index = torch.where(_crowded(share), torch.arange(K), even)
    valid = None
    if padding:
        index, probs = torch.cat([index, E - 1 - torch.arange(K).expand(T, K)]), torch.cat([probs, probs.flip(1)])
        valid = torch.arange(2 * T) < T
    return Routing.from_topk(index, torch.full(index.shape, 1 / K), E, full=True, probs=probs, valid=valid)
