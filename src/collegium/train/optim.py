"""AdamW over the model's parameters, gradient clipping, and the search for the first tensor that is not finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from collegium.routing.router import Router
from collegium.train.recipe import OptimSpec

__all__ = ["build_optimizer", "clip_", "first_non_finite", "gradient_norm"]


def build_optimizer(model: nn.Module, spec: OptimSpec) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) with decay on matrices only.

    Routers are left out of the decay: shrinking their rows flattens the routing without bounding anything. So are
    norms and biases. Selection biases are buffers and never reach the optimizer.
    """
    routers = {id(p) for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = p.dim() >= 2 and id(p) not in routers and not name.endswith("bias")
            (decayed if matrix else plain).append(p)
    groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True
    )


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Scalar: the 2-norm of all gradients together."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads)


def clip_(parameters: list[nn.Parameter], norm: float, limit: float) -> None:
    """Scale all gradients, whose norm is `norm`, down to `limit` in place; a limit of 0 does nothing."""
    if limit and norm > limit:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], limit / norm)


def first_non_finite(model: nn.Module) -> str | None:
    """The first parameter, else the first gradient, that holds NaN or infinity; None if there is none."""
    for name, p in model.named_parameters():
        if not bool(p.isfinite().all()):
            return f"parameter {name}"
    for name, p in model.named_parameters():
        if p.grad is not None and not bool(p.grad.isfinite().all()):
            return f"gradient of {name}"
    return None
