"""Collectors of what routers do: how often, how surely, together with whom, and who would step in.

Legend: T tokens that count, E experts, K experts a token chooses, A assignments; z logits, p probabilities, w combine
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from collegium.compress.collectors_outputs import expert_entry, expert_sums
from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.measure.collect import Need, SiteBatch
from collegium.measure.statistics import Entry
from collegium.sites import Site

__all__ = ["Ballots", "CoActivations", "LogitGram", "RouterSums", "logits_of"]


def logits_of(batch: SiteBatch) -> Tensor:
    """``[T, E]`` float32 logits of the tokens that count. Raises UnsupportedFamilyError where the router shows none."""
    logits = batch.routing.logits
    if logits is None:
        raise UnsupportedFamilyError(f"{batch.site.path} (family {batch.site.family!r}) shows no router logits")
    return logits.detach()[batch.valid].float()


@dataclass(frozen=True)
class RouterSums:
    """``w_sum``: of combine weights; ``w_share_sum``: of combine weights divided by the sum of those of the token;
    ``p_sum``: of probabilities, over all tokens; ``z_topk_sum``: of logits, over the tokens where the expert is among
    the `slots` largest and has at least `share` of the softmax over those. All [E].

    Attributes:
        slots: None means the model's K. PreMoe's released code takes 1.
        share: 0 takes all; PreMoe (2025, arXiv 2505.17639) calls it r.
    """

    slots: int | None = None
    share: float = 0.0

    name: ClassVar[str] = "router_sums"
    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})
    statistics: ClassVar[tuple[Entry, ...]] = tuple(
        expert_entry("router_sums", name) for name in ("w_sum", "w_share_sum", "p_sum", "z_topk_sum")
    )

    def __post_init__(self) -> None:
        if (self.slots is not None and self.slots < 1) or not 0 <= self.share <= 1:
            raise ConfigError(f"slots {self.slots} must be at least 1, share {self.share} in [0, 1]")

    def start(self, site: Site) -> dict[str, Tensor]:
        return {entry.name: torch.zeros(site.num_experts, dtype=torch.float64) for entry in self.statistics}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        z = logits_of(batch)
        weight = batch.weight.double()
        total = weight.new_zeros(len(batch.valid)).index_add(0, batch.token, weight)[batch.token]
        state["w_sum"] += expert_sums(batch, weight)
        state["w_share_sum"] += expert_sums(batch, torch.where(total > 0, weight / total, 0))
        state["p_sum"] += _probabilities(batch.site, z).double().sum(0).cpu()
        largest, expert = z.topk(min(self.slots or batch.site.top_k, z.shape[1]), dim=1)
        live = largest.softmax(1) >= self.share
        state["z_topk_sum"].index_add_(0, expert[live].cpu(), largest[live].double().cpu())

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


def _probabilities(site: Site, z: Tensor) -> Tensor:
    """``[T, E]`` the router's probabilities of its logits."""
    if site.score == "softmax":
        return z.softmax(1)
    if site.score == "sigmoid":
        return z.sigmoid()
    if site.score == "sqrtsoftplus":
        return F.softplus(z).sqrt()
    raise UnsupportedFamilyError(
        f"{site.path} (family {site.family!r}): it is not known what makes probabilities of its logits (score "
        f"{site.score!r}); leave out the scores that need them"
    )


@dataclass(frozen=True)
class Ballots:
    """``ballots [E, E]``: at ``[e, r]`` how many tokens rank expert e at place r of their logits, 0 the first.

    A bias that steers the selection only (DeepSeek-V3) is left out: it speaks of load, not of what a token prefers.
    """

    name: ClassVar[str] = "ballots"
    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})
    statistics: ClassVar[tuple[Entry, ...]] = (
        Entry(name="ballots", collector="ballots", axes=("E", "E"), dtype="int64", by_domain=True),
    )

    def start(self, site: Site) -> dict[str, Tensor]:
        return {"ballots": torch.zeros(site.num_experts, site.num_experts, dtype=torch.int64)}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        E = batch.site.num_experts
        ranked = logits_of(batch).argsort(dim=1, descending=True, stable=True)
        cells = ranked * E + torch.arange(E, device=ranked.device)
        state["ballots"] += torch.bincount(cells.flatten(), minlength=E * E).view(E, E).cpu()

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


@dataclass(frozen=True)
class LogitGram:
    """``z_gram [E, E]``: ``Z^T Z``, sums of products of two experts' logits (for MC-SMoE's grouping, 2023, arXiv
    2310.01334). Over all domains together."""

    name: ClassVar[str] = "logit_gram"
    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})
    statistics: ClassVar[tuple[Entry, ...]] = (Entry(name="z_gram", collector="logit_gram", axes=("E", "E")),)

    def start(self, site: Site) -> dict[str, Tensor]:
        return {"z_gram": torch.zeros(site.num_experts, site.num_experts, dtype=torch.float64)}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        z = logits_of(batch).double()
        state["z_gram"] += (z.T @ z).cpu()

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


@dataclass(frozen=True)
class CoActivations:
    """``coact [E, E]``: how many tokens chose both of two experts, and on the diagonal how many chose one. Over all
    domains together."""

    name: ClassVar[str] = "coactivations"
    needs: ClassVar[frozenset[Need]] = frozenset()
    statistics: ClassVar[tuple[Entry, ...]] = (
        Entry(name="coact", collector="coactivations", axes=("E", "E"), dtype="int64"),
    )

    def start(self, site: Site) -> dict[str, Tensor]:
        return {"coact": torch.zeros(site.num_experts, site.num_experts, dtype=torch.int64)}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        # float64 counts are exact, and have a fast product, unlike integers
        chosen = batch.weight.new_zeros(len(batch.valid), batch.site.num_experts, dtype=torch.float64)
        chosen[batch.token, batch.expert] = 1
        state["coact"] += (chosen.T @ chosen).long().cpu()

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state
