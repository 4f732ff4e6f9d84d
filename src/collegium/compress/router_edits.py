"""How a router follows when several experts become one: from E rows to E'.

A router computes ``z = R x`` and chooses by z. The rows of experts that are not merged stay as they are, whatever the
mode. Selection biases, which no logit holds, follow by the same weights as the rows.

Legend: E experts, E' new experts, d model width, R [E, d] router rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collegium.catalog import get, method
from collegium.compress.plan_layer import LayerPlan
from collegium.errors import ConfigError

__all__ = ["RouterRows", "edit_router", "edit_vector", "mixing", "router_edit_needs"]


@dataclass(frozen=True, eq=False)
class RouterRows:
    """What an edit may look at.

    Attributes:
        rows: ``[E, d]`` float64.
        bias: ``[E]`` float64 added to the logits, or None.
        mixing: ``[E', E]`` float64, see `mixing`.
        dominant: ``[E']`` the old id whose place a new expert takes.
        inputs: ``[N, d]`` float64 sample of router inputs, if the edit needs it.
    """

    rows: Tensor
    bias: Tensor | None
    mixing: Tensor
    dominant: Tensor
    inputs: Tensor | None = None


Edited = tuple[Tensor, Tensor | None]
"""``(rows [E', d], bias [E'] or None)``."""


def mixing(layer: LayerPlan) -> Tensor:
    """``[E', E]`` float64: the share of each old expert in each new one, by the plan's weights."""
    found = torch.zeros(len(layer.keep), layer.num_experts, dtype=torch.float64)
    for new, (members, shares) in enumerate(zip(layer.members, layer.shares, strict=True)):
        found[new, list(members)] = torch.tensor(shares, dtype=torch.float64)
    return found


@method("rows", kind="router_edit", paper="REAP the Experts (2025)", arxiv="2510.13999")
def rows(router: RouterRows) -> Edited:
    """The row of the dominant member, as it is. Tokens that chose another member go elsewhere."""
    return router.rows[router.dominant], None if router.bias is None else router.bias[router.dominant]


@method("freq_avg", kind="router_edit", paper="SlimQwen (2026), rows combined as the experts", arxiv="2605.08738")
def freq_avg(router: RouterRows, rescale: bool = True) -> Edited:
    """The mean of the members' rows by their shares. Rows that disagree shrink when they are averaged, so with
    `rescale` the result has the length of the dominant's."""
    mixed = router.mixing @ router.rows
    if rescale:
        lengths = router.rows[router.dominant].norm(dim=1)
        mixed = mixed * (lengths / mixed.norm(dim=1).clamp(min=1e-12))[:, None]
    return mixed, None if router.bias is None else router.mixing @ router.bias


@method("dern", kind="router_edit", paper="DERN (2025)", arxiv="2509.10377")
def dern(router: RouterRows) -> Edited:
    """The convex mix of a host's row and those of the experts whose neurons it took, by importance and moved share. The
    paper leaves open whether rows are added or mixed; mixing keeps the scale of the logits."""
    return router.mixing @ router.rows, None if router.bias is None else router.mixing @ router.bias


@method("lse_fit", kind="router_edit", paper="own work (2026)")
def lse_fit(router: RouterRows, ridge: float = 1e-3) -> Edited:
    """One linear row fitted to the logarithm of the summed exponentials of the members' logits, on a sample of inputs:
    what a softmax over all members would give the group as a whole. `ridge` is relative to the mean square input."""
    X = router.inputs
    assert X is not None
    z = X @ router.rows.T
    if router.bias is not None:
        z = z + router.bias
    member = router.mixing > 0
    target = torch.stack([z[:, one].logsumexp(1) for one in member], 1)  # [N, E']
    if router.bias is not None:
        X = torch.cat([X, X.new_ones(len(X), 1)], 1)
    gram = X.T @ X
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    fitted = torch.linalg.solve(gram, X.T @ target).T
    if router.bias is None:
        return fitted, None
    return fitted[:, :-1], fitted[:, -1]


_NEEDS = {"lse_fit": ("x_sample",)}


def _find(mode: str) -> Callable[..., Edited]:
    return get("router_edit", mode)


def router_edit_needs(mode: str) -> tuple[str, ...]:
    """The statistics that an edit reads. Raises ConfigError if there is no such edit."""
    if mode == "many_to_one":
        return ()
    _find(mode)
    return _NEEDS.get(mode, ())


def edit_router(router: RouterRows, mode: str, settings: dict[str, Any]) -> Edited:
    """The rows (and bias) of the new experts.

    Raises:
        ConfigError: there is no edit `mode`, it has no such setting, or it needs a sample of inputs.
    """
    function = _find(mode)
    if router_edit_needs(mode) and router.inputs is None:
        raise ConfigError(f"router edit {mode!r} needs the statistic x_sample; calibrate with it, and name the folder")
    try:
        new, bias = function(router, **settings)
    except TypeError as error:
        raise ConfigError(f"router edit {mode!r}: {error}") from error
    alone = (router.mixing > 0).sum(1) <= 1
    kept = router.dominant[alone]
    new[alone] = router.rows[kept]  # bit for bit
    if bias is not None and router.bias is not None:
        bias[alone] = router.bias[kept]
    return new, bias


def edit_vector(values: Tensor, mixing: Tensor, dominant: Tensor, mode: str) -> Tensor:
    """``[E']`` a selection bias ``[E]`` for the new experts: that of the dominant member with "rows", else the mix."""
    if mode == "rows":
        return values[dominant]
    mixed = mixing @ values
    alone = (mixing > 0).sum(1) <= 1
    mixed[alone] = values[dominant[alone]]
    return mixed
