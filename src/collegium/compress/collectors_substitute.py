"""Leave one expert out: what becomes of the block's output for its tokens when the router must do without it.

Legend: T tokens that count, E experts, K experts a token chooses, A assignments, d model width, m experts of a token
that matter (its own and those that would step in).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from collegium.compress.collectors_outputs import expert_entry
from collegium.compress.collectors_router import logits_of
from collegium.errors import UnsupportedFamilyError
from collegium.measure.collect import Need, SiteBatch, weights_of
from collegium.measure.site_batch import expert_hidden, expert_outputs
from collegium.measure.statistics import Entry
from collegium.routing import Router, RoutingContext, router_from_gate
from collegium.routing.parts import Scores
from collegium.sites import Site

__all__ = ["LeaveOneOut", "router_of"]

_CHUNK = 1 << 23  # values of one intermediate result in memory at a time
_APART = 0.05  # share of the combine weights that a router made here may place elsewhere than the model does (ties)


def router_of(site: Site, why: str) -> Router:
    """A router that chooses as the site's own does.

    Raises:
        UnsupportedFamilyError: none is known for it; `why` says what to leave out.
    """
    try:
        router = router_from_gate(site.gate, block=site.block)
    except UnsupportedFamilyError as error:
        raise UnsupportedFamilyError(f"{site.path} (family {site.family!r}): {error}; {why}") from error
    if not router.selection.fixed:
        raise UnsupportedFamilyError(
            f"{site.path} (family {site.family!r}): its router chooses {type(router.selection).__name__}, not a fixed "
            f"number of experts; {why}"
        )
    return router


@dataclass(frozen=True)
class LeaveOneOut:
    """``loo_mse [E]``: over the tokens routed to an expert, the sum of the mean squared difference (over d channels)
    between what the routed experts put out and what they would put out without it (ModelOpt Puzzletron, 2025).

    Without it means that the router chooses again with the expert's logit at minus infinity: by its own scores, group
    limits and selection bias, with the weights it would then give. Mostly the (K+1)-th expert steps in, so that one
    more expert is computed for a token, not K more.
    """

    name: ClassVar[str] = "leave_one_out"
    needs: ClassVar[frozenset[Need]] = frozenset({"outputs", "logits"})
    statistics: ClassVar[tuple[Entry, ...]] = (expert_entry("leave_one_out", "loo_mse"),)

    def start(self, site: Site) -> dict[str, Any]:
        why = "leave out the collector leave_one_out"
        if site.scales_input:
            raise UnsupportedFamilyError(
                f"{site.path} (family {site.family!r}): the weight goes into the expert's input, so the output with "
                f"other weights cannot be told; {why}"
            )
        return {"loo_mse": torch.zeros(site.num_experts, dtype=torch.float64), "router": router_of(site, why)}

    def update(self, state: dict[str, Any], batch: SiteBatch) -> None:
        if not len(batch.token):
            return
        z, E, router = logits_of(batch), batch.site.num_experts, state["router"]
        index, weight = (rows[batch.valid] for rows in batch.routing.to_topk())
        told = _dense(index, weight, E)
        _check(batch.site, router, z, told)
        changes = torch.stack([_without(router, z, slot) - told for slot in index.unbind(1)], 1)
        errors, used = _errors(batch, changes), index < E
        state["loo_mse"].index_add_(0, index[used].cpu(), errors[used].cpu())

    def finish(self, state: dict[str, Any]) -> dict[str, Tensor]:
        return {"loo_mse": state["loo_mse"]}


def _dense(index: Tensor, weight: Tensor, num_experts: int) -> Tensor:
    """``[T, E]`` float32 weights of ``index [T, K]``, in which E marks an unused slot."""
    weight = weight.detach().float()
    return weight.new_zeros(len(index), num_experts + 1).scatter_add(1, index, weight)[:, :num_experts]


def _check(site: Site, router: Router, z: Tensor, told: Tensor) -> None:
    """Refuse a site where something between the router and the experts changes what the router decided."""
    apart = (_dense(*router.route(z).to_topk(), site.num_experts) - told).abs().sum()
    if apart > _APART * told.abs().sum():
        raise UnsupportedFamilyError(
            f"{site.path} (family {site.family!r}): its experts are not told what its router decides by its logits, so "
            "it cannot be said which expert would step in; leave out the collector leave_one_out"
        )


def _without(router: Router, z: Tensor, gone: Tensor) -> Tensor:
    """``[T, E]`` the weights each token gives without expert ``gone [T]``."""
    absent = torch.zeros_like(z, dtype=torch.bool).scatter(1, gone.clamp(max=z.shape[1] - 1)[:, None], True)
    context = RoutingContext()
    z = z.masked_fill(absent, -torch.inf)
    probs = router.score(z)
    # a selection bias, which may be larger than a probability, must not bring it back
    scores = Scores(z, probs, probs.masked_fill(absent, -torch.inf), router.e_score_correction_bias)
    for transform in router.transforms:
        scores = transform(scores, context)
    index = router.selection(scores, router.top_k, context)
    return _dense(index, router.weigh(scores, index, context) * router.routed_scaling_factor, z.shape[1])


def _errors(batch: SiteBatch, changes: Tensor) -> Tensor:
    """``[T, K]`` float64 mean squared change of the routed output for ``changes [T, K, E]`` of its weights."""
    matter = (changes != 0).any(1)
    place, extra = _places(batch, matter)
    m, d, own = int(matter.sum(1).max()), batch.outputs.shape[1], len(batch.outputs)
    ids = matter.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :m]
    errors = []
    for n in torch.arange(len(ids), device=ids.device).split(max(1, _CHUNK // max(1, m * d))):
        row = place[n].gather(1, ids[n])
        y = batch.outputs[row.clamp(0, own - 1)]
        y[row >= own] = extra[row[row >= own] - own]
        change = changes[n].gather(2, ids[n][:, None].expand(-1, changes.shape[1], -1)).double()
        gram = torch.bmm(y, y.transpose(1, 2)).double()
        errors.append((torch.bmm(change, gram) * change).sum(2).clamp(min=0) / d)
    return torch.cat(errors)


def _places(batch: SiteBatch, matter: Tensor) -> tuple[Tensor, Tensor]:
    """``([T, E], [X, d])``: for each token and expert that ``matter [T, E]`` the row of its output in ``batch.outputs``
    or, counted on from there, in the second table, which is of experts that were not chosen."""
    live = batch.valid.nonzero().squeeze(1)
    local = batch.valid.cumsum(0) - 1
    own = len(batch.token)
    place = torch.full(matter.shape, -1, device=matter.device)
    place[local[batch.token], batch.expert] = torch.arange(own, device=matter.device)
    expert, token = (matter & (place < 0)).T.nonzero().unbind(1)  # sorted by expert
    counts = torch.bincount(expert, minlength=matter.shape[1])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    weights = weights_of(batch.site)
    hidden = expert_hidden(weights, batch.x, live[token], offsets)
    place[token, expert] = torch.arange(own, own + len(token), device=matter.device)
    return place, expert_outputs(weights, hidden, offsets)
