"""Collectors of what the importance scores need. Sums over the tokens routed to each expert, kept by domain.

Legend: T tokens, E experts, K experts a token chooses, A assignments, d model width; z logits, p probabilities, w
combine weights, y the output of an expert before its combine weight, u the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from collegium.compress.importance import find_importance
from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.measure.collect import Collector, Counts, Need, SiteBatch, weights_of
from collegium.measure.statistics import Entry
from collegium.measure.super_experts import DownMax
from collegium.sites import Site

__all__ = ["COLLECTORS", "OutputMean", "OutputNormMax", "OutputNorms", "ResidualTurn", "RouterSums", "collectors_for"]


def _sums(batch: SiteBatch, rows: Tensor) -> Tensor:
    """``[E]`` float64 sums of ``rows [A]`` by expert, on the CPU."""
    rows = rows.double()
    return rows.new_zeros(batch.site.num_experts).index_add(0, batch.expert, rows).cpu()


def _combine(batch: SiteBatch) -> Tensor:
    """``[A]`` what multiplies an output; 1 where the weight has gone into the expert's input (Llama-4)."""
    return torch.ones_like(batch.weight) if batch.site.scales_input else batch.weight


def _entry(collector: str, name: str) -> Entry:
    return Entry(name=name, collector=collector, axes=("E",), by_domain=True)


@dataclass(frozen=True)
class RouterSums:
    """``w_sum``: of combine weights; ``p_sum``: of probabilities, over all tokens; ``z_topk_sum``: of logits, over the
    tokens where the expert is among the `slots` largest and has at least `share` of the softmax over those. All [E].

    Attributes:
        slots: None means the model's K. PreMoe's released code takes 1.
        share: 0 takes all; PreMoe (2025, arXiv 2505.17639) calls it r.
    """

    slots: int | None = None
    share: float = 0.0

    name: ClassVar[str] = "router_sums"
    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})
    statistics: ClassVar[tuple[Entry, ...]] = tuple(
        _entry("router_sums", name) for name in ("w_sum", "p_sum", "z_topk_sum")
    )

    def __post_init__(self) -> None:
        if (self.slots is not None and self.slots < 1) or not 0 <= self.share <= 1:
            raise ConfigError(f"slots {self.slots} must be at least 1, share {self.share} in [0, 1]")

    def start(self, site: Site) -> dict[str, Tensor]:
        return {entry.name: torch.zeros(site.num_experts, dtype=torch.float64) for entry in self.statistics}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        logits = batch.routing.logits
        if logits is None:
            raise UnsupportedFamilyError(f"{batch.site.path} (family {batch.site.family!r}) shows no router logits")
        z = logits.detach()[batch.valid].float()
        state["w_sum"] += _sums(batch, batch.weight)
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
class OutputNorms:
    """``ean_sum``, ``ean_sq_sum``, ``w_ean_sum``: sums of ``||y||``, ``||y||^2`` and ``w ||y||``. All [E]."""

    name: ClassVar[str] = "output_norms"
    needs: ClassVar[frozenset[Need]] = frozenset({"outputs"})
    statistics: ClassVar[tuple[Entry, ...]] = tuple(
        _entry("output_norms", name) for name in ("ean_sum", "ean_sq_sum", "w_ean_sum")
    )

    def start(self, site: Site) -> dict[str, Tensor]:
        return {entry.name: torch.zeros(site.num_experts, dtype=torch.float64) for entry in self.statistics}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        norms = batch.outputs.norm(dim=1).double()
        state["ean_sum"] += _sums(batch, norms)
        state["ean_sq_sum"] += _sums(batch, norms.square())
        state["w_ean_sum"] += _sums(batch, norms * _combine(batch))

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
        norms = batch.outputs.norm(dim=1).double()
        state["ean_max"].scatter_reduce_(0, batch.expert.cpu(), norms.cpu(), "amax")

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


@dataclass(frozen=True)
class OutputMean:
    """``out_sum [E, d]``: sum of y. Over all domains together: it is by far the largest statistic."""

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
    statistics: ClassVar[tuple[Entry, ...]] = (_entry("residual_turn", "easy_sum"),)

    def start(self, site: Site) -> dict[str, Tensor]:
        return {"easy_sum": torch.zeros(site.num_experts, dtype=torch.float64)}

    def update(self, state: dict[str, Tensor], batch: SiteBatch) -> None:
        if batch.residual is None:
            raise ConfigError(f"{batch.site.path}: a batch for {self.name} needs the residual stream")
        u = batch.residual.float()
        parts = batch.outputs * _combine(batch)[:, None]
        added = torch.zeros_like(u).index_add(0, batch.token, parts)
        turn = (1 - F.cosine_similarity(u, u + added, dim=1)).clamp(min=0)
        turn = torch.where(batch.position >= self.skip, turn, 0)
        state["easy_sum"] += _sums(batch, turn[batch.token].double() * parts.norm(dim=1).double())

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


COLLECTORS: tuple[type[Collector], ...] = (
    Counts,
    RouterSums,
    OutputNorms,
    OutputNormMax,
    OutputMean,
    ResidualTurn,
    DownMax,
)
"""What a calibration pass can gather."""


def collectors_for(*names: str) -> list[Collector]:
    """The collectors, with default settings, that gather what the importance scores `names` need, and what tells super
    experts, which every plan protects.

    Raises:
        ConfigError: there is no such score.
    """
    wanted = {need for name in names for need in find_importance(name).needs}
    wanted.add("down_max")
    return [one() for one in COLLECTORS if wanted & {entry.name for entry in one.statistics}]
