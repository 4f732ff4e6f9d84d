"""Two passes that should agree.

Legend: N predicted tokens, n rows of a chunk, d width, V vocabulary.

    L = (CE(p) + CE(q)) / 2 + alpha / 2 * J,    J = (KL(p || q) + KL(q || p)) / 2 = sum_v (p - q)(log p - log q) / 2

with p and q the predictions of the two passes. This is half of the paper's loss, so that its first part stays nats per
token; alpha means what it means there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.train.objective import Objective, chunks, in_autocast_dtype
from collegium.train.objectives.base import MicroBatch, StepObjective

__all__ = ["Consistency", "pair_loss"]

PASSES = 2


@method("consistency", kind="objective", paper="THOR (2021)", arxiv="2110.04260")
@dataclass(frozen=True)
class Consistency(StepObjective):
    """Two forward passes of a micro-batch that differ in all random choices, and a divergence that draws their
    predictions together: with experts by chance (system `thor`) it teaches them to agree.

    Routers draw anew in the second pass (`RoutingContext.draw`), and so does dropout. Balance losses are means over the
    passes, whose counts add up.

    Formula:
        loss = (CE(p) + CE(q)) / 2 + alpha / 2 J,  J = (KL(p || q) + KL(q || p)) / 2,
          p and q of the two passes

    Cost:
        a step takes twice the time and holds the activations of two passes.

    Use it:
        with the system `thor`, or with dropout, where text is scarce.

    Not:
        where nothing is random: the passes agree, and the second is wasted.

    Attributes:
        alpha: weight of the divergence; 1 in the authors' code, up to 5 in the paper, 0 leaves two passes apart.

    Raises:
        ConfigError: `alpha` is negative or no number.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise ConfigError(f"alpha must be a number of at least 0, not {self.alpha}")

    def step(self, batch: MicroBatch) -> dict[str, Tensor]:
        outputs, balances = [], []
        for draw in range(PASSES):
            with batch.routed(draw):
                with batch.autocast():
                    output, target = batch.predictor.predict(batch.inputs)
                outputs.append(output)
                balances.append(batch.balance(PASSES))
        # the passes go backward one by one, each inside its own context: only one can be set while activations are
        # computed anew
        leaves = [output.detach().requires_grad_() for output in outputs]
        with batch.autocast():
            loss, parts = pair_loss(batch.predictor, leaves[0], leaves[1], target, self.alpha, batch.predicted)
        loss.backward()
        for draw, (output, balance, leaf) in enumerate(zip(outputs, balances, leaves, strict=True)):
            losses = [value for value in balance.values() if value.requires_grad]
            with batch.routed(draw):
                torch.autograd.backward([output, *losses], [leaf.grad, *map(torch.ones_like, losses)])
        both = {name: torch.stack([one[name].detach() for one in balances]).sum() for name in balances[0]}
        return {"loss": parts[0], "consistency": parts[1], **both}


def pair_loss(
    predictor: Objective, first: Tensor, second: Tensor, target: Tensor, alpha: float, divisor: float
) -> tuple[Tensor, Tensor]:
    """``(scalar, [2])``: the loss over all tokens, divided by `divisor`, differentiable; and its two parts, detached:
    the text's (nats) and the divergence's, times ``alpha / 2``.

    Args:
        predictor: whose `weight` makes logits of hidden states, chunk by chunk.
        first, second: ``[N, d]`` hidden states of the passes (or logits ``[N, V]``), as `Objective.predict` gives them.
        target: ``[N]`` int64.
        alpha: of the divergence.
        divisor: what sums are divided by.
    """
    if predictor.weight is None:
        parts = torch.stack(_sums(first.float(), second.float(), target, alpha)) / divisor
        return parts.sum(), parts.detach()
    first, second = in_autocast_dtype(first), in_autocast_dtype(second)
    with torch.autocast(first.device.type, enabled=False):
        loss, parts = _PairLoss.apply(first, second, predictor.weight, target, alpha, 1.0 / divisor)
    return loss, parts


def _sums(first: Tensor, second: Tensor, target: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Both parts, summed over ``[n, V]`` float32 logits of the passes."""
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    text = -(p.gather(1, target[:, None]) + q.gather(1, target[:, None])).sum() / 2
    # of logarithms, since a probability that rounds to zero has none
    apart = ((p.exp() - q.exp()) * (p - q)).sum() / 2
    return text, alpha / 2 * apart


class _PairLoss(torch.autograd.Function):
    """`pair_loss` of ``logits = hidden @ weight.T``, its gradients taken along with the value, chunk by chunk: what is
    kept is twice ``[N, d]`` and once ``[V, d]``, never ``[N, V]``."""

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, weight: Tensor, target: Tensor, alpha: float, scale: float
    ) -> tuple[Tensor, Tensor]:
        hidden = [first.detach(), second.detach()]
        operand = weight.detach().to(first.dtype)
        grads = [torch.empty_like(one) for one in hidden]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        sums = torch.zeros(2, dtype=torch.float64, device=first.device)
        # two passes share the bytes of one
        for rows in chunks(len(target), PASSES * len(weight)):
            logits = [(one[rows] @ operand.T).float().requires_grad_() for one in hidden]
            with torch.enable_grad():
                parts = torch.stack(_sums(logits[0], logits[1], target[rows], alpha))
                of_logits = torch.autograd.grad(parts.sum(), logits)
            for one, grad, z in zip(hidden, grads, of_logits, strict=True):
                z = z.to(one.dtype)
                torch.mm(z, operand, out=grad[rows])
                grad_weight += z.T @ one[rows]
            sums += parts.detach().double()
        ctx.save_for_backward(*(grad.mul_(scale) for grad in grads), grad_weight.mul_(scale).to(weight.dtype))
        means = (sums * scale).float()
        ctx.mark_non_differentiable(means)
        return (sums.sum() * scale).float(), means

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first, second, weight = (one * grads[0].to(one.dtype) for one in ctx.saved_tensors)
        return first, second, weight, None, None, None
