"""More losses on a layer, each a frozen dataclass named in ``balance.losses``.

A *routing loss* reads the routing of a training forward; a *weight loss* reads the router's and the experts' weights.

Legend: T tokens, E experts, K experts per token, G groups, d model width, f expert width, A assignments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from collegium.balance.losses import load_balancing_loss
from collegium.balance.stats import LoadStats
from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.named import snake
from collegium.rng import generator
from collegium.routing.record import Routing

__all__ = ["ClassBalance", "DeviceBalance", "ExpertRouterCoupling", "RoutingEntropy", "RoutingLoss", "WeightLoss"]


@dataclass(frozen=True)
class _Loss:
    coefficient: float = 0.01

    def check(self, num_experts: int) -> None:
        """Refuse settings that do not fit so many experts. Raises ConfigError."""
        if not self.coefficient >= 0:
            raise ConfigError(f"{snake(self)}: coefficient must be at least 0, not {self.coefficient}")


@dataclass(frozen=True)
class RoutingLoss(_Loss, ABC):
    """A loss on the routing of one layer.

    Attributes:
        coefficient: it is multiplied by.
        needs_logits: the router must keep its logits.
        is_balance: it is 1 at even load and grows with skew.
    """

    needs_logits: ClassVar[bool] = False
    is_balance: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, routing: Routing, stats: LoadStats | None) -> Tensor:
        """A float32 scalar, without the coefficient.

        Args:
            routing: of the latest training forward.
            stats: counts of the whole step, where the layer's scope is "global"; else None.
        """


@dataclass(frozen=True)
class WeightLoss(_Loss, ABC):
    """A loss on the weights of one layer.

    Attributes:
        coefficient: it is multiplied by.
    """

    @abstractmethod
    def __call__(self, router: nn.Module, experts: Any, key: tuple[int | str, ...]) -> Tensor:
        """A float32 scalar, without the coefficient.

        Args:
            router: with `weight` ``[E, d]``.
            experts: with `weights`, see `ExpertWeights`.
            key: for random choices, so that recomputation and all processes draw the same.
        """


def _balance(routing: Routing, stats: LoadStats | None, **more: Any) -> Tensor:
    return load_balancing_loss(routing, scope="micro_batch" if stats is None else "global", stats=stats, **more)


@method("routing_entropy", kind="routing_loss", paper="Harder Tasks Need More Experts (2024)", arxiv="2403.07652")
@dataclass(frozen=True)
class RoutingEntropy(RoutingLoss):
    """Keeps a top-p router from flattening its probabilities, which would activate all experts.

    Formula:
        loss = mean_t(-sum_e p_te log p_te),  rows of p of sum 1

    Cost:
        one pass over ``[T, E]``.

    Use it:
        with a selection that takes as many experts as it needs to reach a probability.

    Not:
        with top-K, whose number of experts does not depend on it: it only makes the router sure early.
    """

    coefficient: float = 1e-4

    def __call__(self, routing: Routing, stats: LoadStats | None) -> Tensor:
        if routing.probs is None:
            raise ConfigError("the routing entropy needs routing.probs, and this routing has none")
        p = routing.probs.float()
        p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        entropy = -(p * p.clamp(min=1e-20).log()).sum(-1)  # at 0 the slope of p log p is infinite
        if routing.valid is None:
            return entropy.mean()
        return (entropy * routing.valid).sum() / routing.valid.sum().clamp(min=1)


@method("device_balance", kind="routing_loss", paper="DeepSeekMoE (2024)", arxiv="2401.06066")
@dataclass(frozen=True)
class DeviceBalance(RoutingLoss):
    """`load_balancing_loss` between groups of neighbouring experts (those of a device) instead of experts.

    Formula:
        loss = E sum_e f'_e P_e,  f'_e the mean of f over the group of e

    Cost:
        as the loss between experts: one pass over ``[T, E]`` and a count.

    Use it:
        where experts are spread over devices and only the devices need to be loaded alike (DeepSeekMoE: 0.05, with a
        small loss between experts beside it).

    Not:
        with one group, where it is the constant 1.

    Attributes:
        groups: G; divides E.
    """

    is_balance = True
    groups: int = 1

    def check(self, num_experts: int) -> None:
        super().check(num_experts)
        if self.groups < 1 or num_experts % self.groups:
            raise ConfigError(f"device_balance: {self.groups} groups do not divide {num_experts} experts evenly")

    def __call__(self, routing: Routing, stats: LoadStats | None) -> Tensor:
        E = routing.num_experts
        merge = torch.arange(E, device=routing.expert.device) // (E // self.groups)
        return _balance(routing, stats, merge=merge)


@method("class_balance", kind="routing_loss", paper="MoE++ (2024)", arxiv="2410.07348")
@dataclass(frozen=True)
class ClassBalance(RoutingLoss):
    """`load_balancing_loss` in which experts that compute count 1 and zero-computation ones `tau` (MoE++), or in which
    the zero-computation ones count as one group of interchangeable experts (AdaMoE's null experts).

    Formula:
        loss = E sum_e eta_e f_e P_e,  eta = 1 where an expert computes, tau where not
        with merge, f_e of a zero-computation expert is the mean over all of them

    Cost:
        as the loss between experts: one pass over ``[T, E]`` and a count.

    Use it:
        in a layer with zero-computation experts, in place of the plain loss, to say how much they may be used.

    Not:
        beside the plain loss, which counts all experts alike and pulls the other way.

    Attributes:
        tau: weight of a zero-computation expert: where the load is least, they get 1 / tau times as many tokens.
        merge: take the mean load of all zero-computation experts for each of them.
    """

    is_balance = True
    tau: float = 1.0
    merge: bool = False

    def check(self, num_experts: int) -> None:
        super().check(num_experts)
        if not self.tau > 0:
            raise ConfigError(f"class_balance: tau must be above 0, not {self.tau}")

    def __call__(self, routing: Routing, stats: LoadStats | None) -> Tensor:
        E, F = routing.num_experts, routing.num_true or routing.num_experts
        expert = torch.arange(E, device=routing.expert.device)
        weight = torch.where(expert < F, 1.0, self.tau)
        merge = expert.clamp(max=F) if self.merge else None
        return _balance(routing, stats, class_weight=weight, merge=merge)


@method("expert_router_coupling", kind="weight_loss", paper="Expert-Router Coupling (2025)", arxiv="2512.23447")
@dataclass(frozen=True)
class ExpertRouterCoupling(WeightLoss):
    """Each router row, taken as a token and shaken a little, should excite its own expert most, and each expert its own
    row most.

    A row is multiplied by uniform noise within ``1 +- eps_i``, eps_i half the relative distance to its nearest row, so
    that it stays nearest to itself; eps_i carries no gradient, or it could be gamed.

    Formula:
        M_ij = |W_j (r_i * noise_i)|,
          W_j the gate matrix of expert j (the only one, where experts have no gate)
        loss = 1 / E^2 sum_{i != j} (max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0))

    Cost:
        ``E^2 d f`` multiplications and ``[E, E, f]`` float32 numbers a layer and micro-batch, whatever the number of
        tokens; nothing at inference.

    Use it:
        where routers should learn what their experts can do.

    Not:
        with very many experts or tiny micro-batches, where it costs more than the tokens do.

    Attributes:
        alpha: the smaller, the more an expert must prefer its own row; above 1 it fades out.
    """

    coefficient: float = 1.0
    alpha: float = 1.0

    def check(self, num_experts: int) -> None:
        super().check(num_experts)
        if not self.alpha > 0:
            raise ConfigError(f"expert_router_coupling: alpha must be above 0, not {self.alpha}")
        if num_experts < 2:
            raise ConfigError("expert_router_coupling compares experts; it takes at least 2")

    def __call__(self, router: nn.Module, experts: Any, key: tuple[int | str, ...]) -> Tensor:
        weights = experts.weights
        E = weights.up.shape[0]
        rows = router.weight[:E].float()  # type: ignore[index]
        with torch.no_grad():
            apart = torch.cdist(rows, rows).fill_diagonal_(torch.inf).amin(-1)
            eps = apart / (2 * rows.norm(dim=-1)).clamp(min=1e-20)
            drawn = torch.rand(
                rows.shape, generator=generator(*key, "coupling", device=rows.device), device=rows.device
            )
            noise = 1 + eps[:, None] * (2 * drawn - 1)
        up = weights.up.transpose(1, 2) if weights.transposed else weights.up
        gate = up
        if weights.gated:
            gate = up[:, ::2] if weights.interleaved else up[:, : up.shape[1] // 2]
        excited = torch.einsum("id,jfd->ijf", rows * noise, gate.float()).norm(dim=-1)
        own = self.alpha * excited.diagonal()
        hinge = (excited - own[:, None]).relu() + (excited.T - own[:, None]).relu()
        apart_from_itself = ~torch.eye(E, dtype=torch.bool, device=rows.device)
        return (hinge * apart_from_itself).sum() / E**2
