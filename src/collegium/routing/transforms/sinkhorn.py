"""Balanced by an optimal-transport plan, on rare training steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from collegium.catalog import method
from collegium.errors import ConfigError
from collegium.routing.parts import Part, Scores, Transform
from collegium.routing.record import RoutingContext

__all__ = ["SelectiveSinkhorn", "sinkhorn"]


def sinkhorn(cost: Tensor, xi: float, iterations: int, tolerance: float) -> Tensor:
    """The plan ``[T, E]`` that maximises ``<plan, cost>`` plus `xi` times its entropy, with rows of sum 1 and columns
    of sum T / E; in the log domain, so that a small `xi` does not overflow.

    Args:
        cost: ``[T, E]`` how well they fit.
        iterations: at most.
        tolerance: of the norms of both marginals' errors.
    """
    T, E = cost.shape
    kernel = cost / xi
    column = math.log(T / E)
    u, v = cost.new_zeros(T, 1), cost.new_zeros(1, E)
    for _ in range(iterations):
        v = column - (kernel + u).logsumexp(0, keepdim=True)
        u = -(kernel + v).logsumexp(1, keepdim=True)
        loads = (kernel + u + v).exp().sum(0)
        if float((loads - T / E).norm()) < tolerance * T / E:
            break
    return (kernel + u + v).exp()


@method("selective_sinkhorn", kind="transform", paper="Selective Sinkhorn Routing (2025)", arxiv="2511.08972")
@dataclass(frozen=True)
class SelectiveSinkhorn(Transform):
    """In one of many training steps the router's choice is a transport plan that loads all experts alike; in the
    others, and at inference, it is the plain one. No balance loss is meant to run beside it.

    On such a step the plan is what is selected from and what weighs, without gradient: the router learns in the other
    steps. All processes and recomputed forwards draw the same steps; each solves for its own tokens.

    Formula:
        plan = argmax <plan, cost> + xi entropy(plan),  rows of sum 1, columns of sum T / E
        v = T/E / (M^T u),  u = 1 / (M v),  M = exp(cost / xi),  until columns fit
        plan = diag(u) M diag(v)

    Cost:
        up to `iterations` passes over ``[T, E]`` on a step with a plan, with a look at the result after each; none on
        others.

    Use it:
        where a loss should not pull at the task's gradient.

    Not:
        with a `probability` of 1: then no gradient reaches the router at all.

    Attributes:
        probability: of a step with a plan, drawn for each layer.
        xi: of the entropy. Costs that are probabilities lie in 0 to 1, so that it must be well below 1.
        cost: "probs" (SSR-S) or "logits" (SSR-L).
        noise: deviation of what is added to the logits in the other training steps; 0 is none.
        iterations: passes at most.
        tolerance: norm of the errors of the columns' sums, as a share of T / E, below which the passes end.
    """

    touches = "logits"
    draws = True
    probability: float = 0.01
    xi: float = 0.05
    cost: Literal["probs", "logits"] = "probs"
    noise: float = 0.0
    iterations: int = 50
    tolerance: float = 1e-4

    def check(self, num_experts: int, top_k: int, parts: tuple[Part, ...]) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"probability is {self.probability}; it must be from 0 to 1")
        if not self.xi > 0 or self.iterations < 1 or not self.tolerance > 0 or self.noise < 0:
            raise ConfigError(f"xi, iterations and tolerance must be above 0 and noise at least 0: {self}")
        if self.cost not in ("probs", "logits"):
            raise ConfigError(f"cost is {self.cost!r}; it must be 'probs' or 'logits'")

    def __call__(self, scores: Scores, context: RoutingContext) -> Scores:
        if not context.training:
            return scores
        device = scores.logits.device
        # the micro-batch has no part in it: all tokens of a step take the same way
        key = replace(context, micro_batch=0)
        if float(torch.rand((), generator=key.generator("sinkhorn"))) >= self.probability:
            if not self.noise:
                return scores
            drawn = torch.randn(scores.logits.shape, generator=context.generator("noise", device), device=device)
            return scores.with_logits(scores.logits + self.noise * drawn)
        with torch.no_grad():
            live = torch.ones(len(scores.logits), dtype=torch.bool, device=device)
            live = live if context.valid is None else context.valid
            cost = (scores.logits if self.cost == "logits" else scores.probs)[live].float()
            plan = scores.probs.detach().clone()
            if len(cost):
                plan[live] = sinkhorn(cost, self.xi, self.iterations, self.tolerance)
        return replace(scores, probs=plan, selection=plan)
