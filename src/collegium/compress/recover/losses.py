"""What a shrunk model learns from: the text, and what the original predicts for it.

    L = (1 - l) L_LM + l L_KD,    L_KD = - sum_v q[v] log p[v]

with q the teacher's distribution, p the student's, and l falling linearly over the run (SlimQwen, 2026, arXiv
2605.08738). Of q only the C likeliest tokens are known; all others are one outcome, whose probability under p is the
sum of theirs. The divergence of q and p over these C + 1 outcomes is never above that over all V.

The paper adds the same pair of losses for multi-token-prediction heads. transformers loads no such heads, so there is
nothing here to train with them.

Legend: B sequences, S positions, N = B*(S-1) predicted tokens, n rows of a chunk, d width, V vocabulary, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collegium.train.objective import Objective, chunks

__all__ = ["Distiller", "Targets", "token_losses"]


@dataclass(frozen=True, eq=False)
class Targets:
    """What the teacher predicts for N tokens; `probability` and `rest` of a token are in sum 1.

    Attributes:
        ids: ``[N, C]`` int64, the likeliest tokens, each once; C < V.
        probability: ``[N, C]`` float32.
        rest: ``[N]`` float32, of all other tokens together.
    """

    ids: Tensor
    probability: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, count: int) -> Targets:
        """The `count` likeliest of ``logits [N, V]``, fewer in a vocabulary that has not more than that."""
        p = logits.float().softmax(-1)
        probability, ids = p.topk(min(count, p.shape[1] - 1), dim=-1)
        # the sum of what is left, since a difference from 1 would be rounding where little is
        return cls(ids, probability, p.scatter(1, ids, 0).sum(-1))

    def __getitem__(self, rows: slice) -> Targets:
        return Targets(self.ids[rows], self.probability[rows], self.rest[rows])


def token_losses(logits: Tensor, target: Tensor, targets: Targets | None) -> tuple[Tensor, Tensor]:
    """``([n], [n])`` nats of each token: under the text, and under the teacher (0 without one). Differentiable.

    Args:
        logits: ``[n, V]`` float32, the student's.
        target: ``[n]`` int64, the text.
        targets: the teacher's.
    """
    logp = logits.log_softmax(-1)
    text = -logp.gather(1, target[:, None])[:, 0]
    if targets is None:
        return text, torch.zeros_like(text)
    likely = (targets.probability * logp.gather(1, targets.ids)).sum(-1)
    others = logp.scatter(1, targets.ids, -torch.inf).logsumexp(-1)
    return text, -(likely + targets.rest * others)


class Distiller(Objective):
    """An objective with a second source of targets. Like its base it holds few logits at a time.

    Args:
        model: a transformers causal LM.
    """

    def loss(self, inputs: dict[str, Tensor], targets: Targets | None, kd_share: float) -> tuple[Tensor, Tensor]:
        """``(scalar, [2])``: nats of the predicted tokens, a mean, differentiable; and its two parts, detached: by the
        text and by the teacher.

        Args:
            inputs: of the model.
            targets: of the N predicted tokens, sequence by sequence; None needs a share of 0.
            kd_share: l, between 0 and 1.
        """
        hidden, target = self.predict(inputs)
        if self.weight is not None:
            loss, parts = _HeadLoss.apply(hidden, self.weight, target, targets, kd_share)
            return loss, parts
        means = torch.stack(token_losses(hidden.float(), target, targets)).mean(1)
        return (1 - kd_share) * means[0] + kd_share * means[1], means.detach()

    @torch.no_grad()
    def targets(self, inputs: dict[str, Tensor], count: int) -> Targets:
        """What the model itself predicts: its `count` likeliest tokens at each of the N places."""
        hidden, _ = self.predict(inputs)
        if self.weight is None:
            return Targets.of(hidden, count)
        weight = self.weight.to(hidden.dtype)
        parts = [Targets.of(hidden[rows] @ weight.T, count) for rows in chunks(len(hidden), len(weight))]
        return Targets(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.probability for part in parts]),
            torch.cat([part.rest for part in parts]),
        )


class _HeadLoss(torch.autograd.Function):
    """The loss of ``logits = hidden @ weight.T``, its gradients taken along with the value, chunk by chunk: what is
    kept is ``[N, d]`` and ``[V, d]``, never ``[N, V]``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, targets: Targets | None, kd_share: float
    ) -> tuple[Tensor, Tensor]:
        hidden, weight, N = hidden.detach(), weight.detach(), len(target)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        for rows in chunks(N, len(weight)):
            z = (hidden[rows] @ weight.T).requires_grad_()
            with torch.enable_grad():
                chunk = None if targets is None else targets[rows]
                text, teacher = (one.sum() for one in token_losses(z, target[rows], chunk))
                loss = ((1 - kd_share) * text + kd_share * teacher) / N
            (grad,) = torch.autograd.grad(loss, z)
            torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[rows])
            sums += torch.stack([text, teacher]).detach().double()
        ctx.save_for_backward(grad_hidden, grad_weight)
        means = (sums / N).float()
        ctx.mark_non_differentiable(means)
        return (1 - kd_share) * means[0] + kd_share * means[1], means

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], None if grad_weight is None else grad_weight * grads[0], None, None, None
