"""Collectors of what experts put out and of what their neurons do, over the tokens routed to each.

Legend: T tokens, E experts, A assignments, d model width, f expert width; w combine weights, y the output of an expert
before its combine weight, h what goes into its down projection, u the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from collegium.errors import ConfigError
from collegium.measure.collect import Need, SiteBatch, weights_of
from collegium.measure.statistics import Entry
from collegium.sites import Site

__all__ = ["HiddenSums", "OutputMean", "OutputNormMax", "OutputNorms", "ResidualTurn", "expert_entry", "expert_sums"]


def expert_sums(batch: SiteBatch, rows: Tensor) -> Tensor:
    """``[E]`` float64 sums of ``rows [A]`` by expert, on the CPU."""
    rows = rows.double()
    return rows.new_zeros(batch.site.num_experts).index_add(0, batch.expert, rows).cpu()


def expert_entry(collector: str, name: str) -> Entry:
    """A sum ``[E]``, kept by domain."""
    return Entry(name=name, collector=collector, axes=("E",), by_domain=True)


@dataclass(frozen=True)
class OutputNorms:
    """``ean_sum``, ``ean_sq_sum``, ``w_ean_sum``: sums of ``||y||``, ``||y||^2`` and ``w ||y||``. All [E]."""

    name: ClassVar[str] = "output_norms"
    needs: ClassVar[frozenset[Need]] = frozenset({"outputs"})
    statistics: ClassVar[tuple[Entry, ...]] = tuple(
        expert_entry("output_norms", name) for name in ("ean_sum", "ean_sq_sum", "w_ean_sum")
    )

    def start(self, site: Site) -> dict[str, Tensor]:
        return {entry.name: torch.zeros(site.num_experts, dtype=torch.float64) for entry in self.statistics}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        norms = batch.norms.double()
        state["ean_sum"] += expert_sums(batch, norms)
        state["ean_sq_sum"] += expert_sums(batch, norms.square())
        state["w_ean_sum"] += expert_sums(batch, norms * batch.combine)

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


@dataclass(frozen=True)
class OutputNormMax:
    """``ean_max [E]``: the largest ``||y||``, 0 for an expert without tokens."""

    name: ClassVar[str] = "output_norm_max"
    needs: ClassVar[frozenset[Need]] = frozenset({"outputs"})
    statistics: ClassVar[tuple[Entry, ...]] = (
        Entry(name="ean_max", collector="output_norm_max", axes=("E",), merge="max"),
    )

    def start(self, site: Site) -> dict[str, Tensor]:
        return {"ean_max": torch.zeros(site.num_experts, dtype=torch.float64)}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        state["ean_max"].scatter_reduce_(0, batch.expert.cpu(), batch.norms.double().cpu(), "amax")

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


@dataclass(frozen=True)
class OutputMean:
    """``out_sum [E, d]``: sum of y. Over all domains together: it is by far the largest of the sums."""

    name: ClassVar[str] = "output_mean"
    needs: ClassVar[frozenset[Need]] = frozenset({"outputs"})
    statistics: ClassVar[tuple[Entry, ...]] = (Entry(name="out_sum", collector="output_mean", axes=("E", "d")),)

    def start(self, site: Site) -> dict[str, Tensor]:
        d = weights_of(site).down_t.shape[2]
        return {"out_sum": torch.zeros(site.num_experts, d, dtype=torch.float64)}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        # one expert at a time: a float64 copy of all outputs would be twice their size
        for e, (first, last) in enumerate(pairwise(batch.offsets.tolist())):
            state["out_sum"][e] += batch.outputs[first:last].double().sum(0).cpu()

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


@dataclass(frozen=True)
class HiddenSums:
    """``h_sq``, ``h_abs``: sums of ``h^2`` and ``|h|`` of every neuron. Both [E, f], over all domains together."""

    name: ClassVar[str] = "hidden_sums"
    needs: ClassVar[frozenset[Need]] = frozenset({"hidden"})
    statistics: ClassVar[tuple[Entry, ...]] = tuple(
        Entry(name=name, collector="hidden_sums", axes=("E", "f")) for name in ("h_sq", "h_abs")
    )

    def start(self, site: Site) -> dict[str, Tensor]:
        f = weights_of(site).down_t.shape[1]
        return {entry.name: torch.zeros(site.num_experts, f, dtype=torch.float64) for entry in self.statistics}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        for e, (first, last) in enumerate(pairwise(batch.offsets.tolist())):
            h = batch.hidden[first:last].double()
            state["h_sq"][e] += h.square().sum(0).cpu()
            state["h_abs"][e] += h.abs().sum(0).cpu()

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


@dataclass(frozen=True)
class ResidualTurn:
    """``easy_sum [E]``: sum of ``a w ||y||`` with ``a = max(0, 1 - cos(u, u + r))``, where ``r`` is what the routed
    experts add to the stream ``u`` that enters the block (EASY-EP, 2025, arXiv 2504.06792).

    What a family does to the block's output before it is added (a norm in AFMoE, a factor in Granite) is not seen.

    Attributes:
        skip: so many first tokens of a sequence do not count: massive activations live there.
    """

    skip: int = 1

    name: ClassVar[str] = "residual_turn"
    needs: ClassVar[frozenset[Need]] = frozenset({"outputs", "residual"})
    statistics: ClassVar[tuple[Entry, ...]] = (expert_entry("residual_turn", "easy_sum"),)

    def start(self, site: Site) -> dict[str, Tensor]:
        return {"easy_sum": torch.zeros(site.num_experts, dtype=torch.float64)}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        if batch.residual is None:
            raise ConfigError(f"{batch.site.path}: a batch for {self.name} needs the residual stream")
        live = batch.valid & (batch.position >= self.skip)
        u, added = batch.residual[live].float(), batch.routed[live]
        turn = u.new_zeros(len(batch.valid))
        turn[live] = (1 - F.cosine_similarity(u, u + added, dim=1)).clamp(min=0)
        parts = batch.norms.double() * batch.combine.abs()
        state["easy_sum"] += expert_sums(batch, turn[batch.token].double() * parts)

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state
