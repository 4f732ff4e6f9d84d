"""The language-modelling objective: nats of each predicted token, without ever holding all logits.

Legend: B sequences, S positions, N = B*(S-1) predicted tokens, d width, V vocabulary.

Every token but the first of a sequence is predicted from what precedes it in the sequence; the first token of a
document is predicted from the end token of the document before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collegium.experts.compute.cpu_pool import launch
from collegium.experts.compute.jit import missing
from collegium.train.fused_kernels import LANES, address

__all__ = ["Objective", "chunks", "in_autocast_dtype"]

CHUNK_BYTES = 8 << 20
"""Logits held at a time: what stays in a CPU's cache between the product, the softmax and the products back, and is
large enough for these to run at full rate. Measured at d = 192, V = 4096: 2 MB take 4 to 15 % longer, 16 MB as long."""


class Objective:
    """Predicts and scores. Where the model's logits are a plain matrix product of its last hidden states, the product
    and the loss are taken in chunks of rows; otherwise (scaled or capped logits) the model's own logits are used.

    Args:
        model: a transformers causal LM.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.weight: nn.Parameter | None = _plain_head(self.model)

    def mean_loss(self, inputs: dict[str, Tensor], divisor: float) -> Tensor:
        """Scalar: summed nats of the predicted tokens over `divisor`, differentiable."""
        hidden, target = self.predict(inputs)
        if self.weight is None:
            return F.cross_entropy(hidden.float(), target, reduction="sum") / divisor
        hidden = in_autocast_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            loss: Tensor = _HeadLoss.apply(hidden, self.weight, target, 1.0 / divisor)
        return loss

    @torch.no_grad()
    def nats(self, inputs: dict[str, Tensor]) -> Tensor:
        """``[B, S-1]`` float32 nats of each predicted token."""
        B, S = inputs["input_ids"].shape
        hidden, target = self.predict(inputs)
        if self.weight is None:
            return F.cross_entropy(hidden.float(), target, reduction="none").view(B, S - 1)
        weight = self.weight.to(hidden.dtype)
        parts = [
            F.cross_entropy((hidden[rows] @ weight.T).float(), target[rows], reduction="none")
            for rows in chunks(hidden.shape[0], weight.shape[0])
        ]
        return torch.cat(parts).view(B, S - 1)

    def predict(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``(hidden [N, d], target [N])``; logits ``[N, V]`` in the place of hidden states where `weight` is None."""
        target = inputs["input_ids"][:, 1:].reshape(-1)
        if self.weight is None:
            out = self.model(**inputs, use_cache=False).logits
        else:
            out = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        return out[:, :-1].reshape(target.numel(), -1), target


def _plain_head(model: Any) -> nn.Parameter | None:
    """The output matrix ``[V, d]`` if logits are exactly the last hidden states times it, else None."""
    head = model.get_output_embeddings()
    decoder: Callable[[], Any] | None = getattr(model, "get_decoder", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or decoder is None or decoder() is model:
        return None
    training = model.training
    model.eval()
    with torch.no_grad():
        probe = torch.arange(2, device=head.weight.device)[None]
        hidden = decoder()(input_ids=probe, use_cache=False).last_hidden_state
        # one matrix product of the same operands both times: equal, or a different function
        logits = head(hidden)
        plain = bool(logits.any()) and torch.equal(logits, model(input_ids=probe, use_cache=False).logits)
    model.train(training)
    return head.weight if plain else None


def in_autocast_dtype(x: Tensor) -> Tensor:
    """`x` in the dtype that products on its device are taken in here."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of `rows` rows, of which `CHUNK_BYTES` hold a slice of ``[rows, columns]`` in float32."""
    size = max(1, CHUNK_BYTES // (4 * columns))
    return (slice(at, min(at + size, rows)) for at in range(0, rows, size))


def _nats(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``[n]`` the cross-entropy of each row of logits ``z [n, V]`` float32, and its gradient ``[n, V]``, softmax -
    onehot, which may take the place of `z`."""
    if missing is None and z.device.type == "cpu" and z.shape[1] >= LANES:
        nats, target = torch.empty(len(z)), target.contiguous()
        launch(address("nats"), *z.shape, z.data_ptr(), target.data_ptr(), nats.data_ptr())
        return nats, z
    target, z = target[:, None], z.log_softmax(-1)
    nats = -z.gather(1, target).squeeze(1)
    return nats, z.exp_().scatter_add_(1, target, torch.full_like(target, -1.0, dtype=z.dtype))


class _HeadLoss(torch.autograd.Function):
    """``scale * sum_n cross_entropy(hidden @ weight.T, target)_n``, its gradients taken along with the value.

    The gradient of the logits is softmax - onehot, which exists only chunk by chunk; what is kept is
    ``[N, d]`` and ``[V, d]``.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, scale: float) -> Tensor:
        operand = weight.detach().to(hidden.dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for rows in chunks(hidden.shape[0], weight.shape[0]):
            h = hidden.detach()[rows]
            nats, z = _nats((h @ operand.T).float(), target[rows])
            total += nats.sum(dtype=torch.float64)
            z = z.to(hidden.dtype)
            torch.mm(z, operand, out=grad_hidden[rows])
            if grad_weight.dtype == z.dtype:
                grad_weight.addmm_(z.T, h)
            else:
                grad_weight += z.T @ h
        ctx.save_for_backward(grad_hidden.mul_(scale), grad_weight.mul_(scale).to(weight.dtype))
        return (total * scale).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0].to(grad_hidden.dtype), grad_weight * grads[0].to(grad_weight.dtype), None, None
