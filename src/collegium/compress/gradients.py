"""Collectors of what the loss's gradient says of experts and their neurons. Only a backward pass can feed them.

The loss is the sum of the nats of all predicted tokens, not their mean: then a token's gradient does not depend on how
many tokens there are, and the sums of several passes add up. To compare with a mean over N tokens divide by N^2.

Legend: A assignments of the tokens that count, E experts, d model width, f expert width, u = 2f for gated experts, f
for others; L the loss, h what goes into an expert's down projection, y what comes out of it, before norm and combine
weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from collegium.errors import ConfigError
from collegium.measure.collect import Need, SiteBatch, weights_of
from collegium.measure.statistics import Entry
from collegium.routing import Routing
from collegium.sites import Site

__all__ = ["GradientBatch", "Gradients", "HiddenGradients", "WeightGradients"]


@dataclass(frozen=True, eq=False)
class Gradients:
    """What a backward pass through the experts of one block saw, a row an assignment, sorted by expert.

    Attributes:
        up: ``[A, u]`` dL / d(what comes out of the up projection).
        hidden: ``[A, f]`` h.
        hidden_grad: ``[A, f]`` dL/dh.
        down: ``[A, d]`` dL/dy.
    """

    up: Tensor
    hidden: Tensor
    hidden_grad: Tensor
    down: Tensor

    def rows(self, chosen: Tensor) -> Gradients:
        """Only the rows where ``chosen [A]`` bool is set."""
        if bool(chosen.all()):
            return self
        return Gradients(*(getattr(self, field.name)[chosen] for field in fields(self)))


class GradientBatch(SiteBatch):
    """What one forward and one backward pass showed at one MoE block.

    Attributes:
        gradients: rows as those of `token` and `expert`.
    """

    def __init__(self, site: Site, x: Tensor, routing: Routing, gradients: Gradients, **columns: Any) -> None:
        """`gradients` have a row for every assignment, padding included; see `SiteBatch` for the rest."""
        super().__init__(site, x, routing, **columns)
        self._every = gradients
        self.gradients = gradients.rows(self.valid[routing.dispatch().token])

    def of_domain(self, code: int) -> GradientBatch | None:
        """The same batch with only the tokens of one domain counting; None if there are none."""
        valid = self.valid & (self.domain == code)
        if not bool(valid.any()):
            return None
        if bool((valid == self.valid).all()):
            return self
        columns = {"document": self.document, "domain": self.domain, "position": self.position, "valid": valid}
        return GradientBatch(self.site, self.x, self.routing, self._every, **columns)


def _experts(batch: SiteBatch, name: str) -> Iterator[tuple[int, slice, Gradients]]:
    """``(expert, its rows, gradients)`` of every expert that has rows."""
    if not isinstance(batch, GradientBatch):
        raise ConfigError(
            f"{batch.site.path}: collector {name!r} needs gradients, which only collegium.compress.calibrate gathers"
        )
    for e, (first, last) in enumerate(pairwise(batch.offsets.tolist())):
        if first < last:
            yield e, slice(first, last), batch.gradients


@dataclass(frozen=True)
class HiddenGradients:
    """``dh_sq``, ``hdh_sq``: sums of ``(dL/dh)^2`` and of ``(h dL/dh)^2`` over the tokens of each expert. Both [E, f],
    over all domains together.

    With the sum of h^2 this gives HEAPr's score (2025, arXiv 2509.22299) without its d x d matrices: for column D of
    the down projection, ``D^T mean(g g^T) D = mean((D^T g)^2) = mean((dL/dh)^2)`` with ``g = dL/dy``.
    """

    name: ClassVar[str] = "hidden_gradients"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    statistics: ClassVar[tuple[Entry, ...]] = tuple(
        Entry(name=name, collector="hidden_gradients", axes=("E", "f")) for name in ("dh_sq", "hdh_sq")
    )

    def start(self, site: Site) -> dict[str, Tensor]:
        f = weights_of(site).down_t.shape[1]
        return {entry.name: torch.zeros(site.num_experts, f, dtype=torch.float64) for entry in self.statistics}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        for e, rows, gradients in _experts(batch, self.name):
            h, dh = gradients.hidden[rows].double(), gradients.hidden_grad[rows].double()
            state["dh_sq"][e] += dh.square().sum(0).cpu()
            state["hdh_sq"][e] += (h * dh).square_().sum(0).cpu()

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


@dataclass(frozen=True)
class WeightGradients:
    """``g2 [E]``: sum over batches of ``||dL_b / d(weights of the expert)||^2``, biases included; L_b is the loss of
    a batch. It depends on how the tokens are batched, and a batch of several domains counts as several.

    Expert Upcycling's utility (2026, arXiv 2604.19835), there of the gradient's mean over ten batches.
    """

    name: ClassVar[str] = "weight_gradients"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    statistics: ClassVar[tuple[Entry, ...]] = (
        Entry(name="g2", collector="weight_gradients", axes=("E",), by_domain=True),
    )

    def start(self, site: Site) -> dict[str, Any]:
        weights = weights_of(site)
        biases = (weights.up_bias is not None, weights.down_bias is not None)
        return {"g2": torch.zeros(site.num_experts, dtype=torch.float64), "biases": biases}

    def update(self, state: dict[str, Any], batch: SiteBatch) -> None:
        for e, rows, gradients in _experts(batch, self.name):
            x = batch.x[batch.token[rows]]
            sides = ((gradients.up[rows], x), (gradients.down[rows], gradients.hidden[rows]))
            for (outer, inner), bias in zip(sides, state["biases"], strict=True):
                grad = outer.float()
                state["g2"][e] += _norm_sq(grad.T @ inner.float())
                if bias:
                    state["g2"][e] += _norm_sq(grad.sum(0))

    def finish(self, state: dict[str, Any]) -> dict[str, Tensor]:
        return {"g2": state["g2"]}


def _norm_sq(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dtype=torch.float64).square().cpu()
