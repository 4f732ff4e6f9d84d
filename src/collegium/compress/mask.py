"""`apply_mask`: a plan on a live model, without rewriting anything.

    with apply_mask(model, plan):
        model.generate(...)

While it is open each router sees only its rows of the kept experts, so that everything it does with them (softmax over
all, correction bias, group limits, top-k, renormalising) is what the rewritten model's router would do. Ids in the
taps stay those of the whole model.

Legend: T tokens, E experts, E' kept experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from collegium.compress.plan import LayerPlan, Plan
from collegium.errors import PlanError, UnsupportedFamilyError
from collegium.models.families import KEYS
from collegium.routing import Routing
from collegium.sites import Order, Site, sites, tap
from collegium.sites.adapters.seam import Seam

__all__ = ["apply_mask", "cut_router"]


@contextmanager
def apply_mask(model: nn.Module, plan: Plan) -> Iterator[None]:
    """While open, the experts that `plan` drops are never selected. For inference; routers are not trainable meanwhile.

    A plan that keeps every expert leaves the model bit-identical.

    Raises:
        PlanError: the plan does not fit the model's layers.
        UnsupportedFamilyError: the routers of the family are not rows of one matrix behind transformers' experts
            interface.
    """
    found = sites(model)
    _check(found, plan, model)
    layers = {one.layer: one for one in plan.layers if one.op != "identity"}
    with ExitStack() as stack:
        for site in found:
            if site.layer in layers:
                stack.enter_context(_fewer_rows(site, layers[site.layer]))
        if layers:
            stack.enter_context(tap(model, _OldIds(layers)))
        yield


class _OldIds:
    """Hands on what the smaller routers decided, in the ids of the whole model."""

    order = Order.MASK

    def __init__(self, layers: dict[int, LayerPlan]) -> None:
        self.keep = {layer: torch.tensor(one.keep) for layer, one in layers.items()}

    def __call__(self, site: Site, x: Tensor, routing: Routing) -> Routing | None:
        if site.layer not in self.keep:
            return None
        keep = self.keep[site.layer].to(routing.expert.device)
        logits = routing.logits
        if logits is not None:
            # an expert that is not there is one that no token would choose
            wide = logits.new_full((len(logits), site.num_experts), float("-inf"))
            logits = wide.index_copy(1, keep, logits)
        return replace(routing, expert=keep[routing.expert], logits=logits)


def _check(found: list[Site], plan: Plan, model: Any) -> None:
    mine = {one.layer: one.num_experts for one in plan.layers}
    theirs = {site.layer: site.num_experts for site in found}
    if mine != theirs or len(theirs) != len(found):
        raise PlanError(
            f"the plan for {plan.model} does not fit this {type(model).__name__}: experts by layer are {mine} and "
            f"{[(site.layer, site.num_experts) for site in found]}"
        )
    if odd := [one.layer for one in plan.layers if one.op not in ("prune", "identity") or one.neurons]:
        raise PlanError(
            f"layer {odd[0]} of the plan merges experts or changes what they hold, and a mask only hides experts; "
            "apply the plan, and load the result"
        )
    for site in found:
        if site.top_k != plan.top_k:
            raise PlanError(f"{site.path} chooses {site.top_k} experts; the plan was made for {plan.top_k}")
        if not isinstance(site.adapter, Seam):
            raise UnsupportedFamilyError(
                f"{site.path} (family {site.family!r}) is not behind transformers' experts interface; its experts "
                "cannot be masked"
            )


@contextmanager
def _fewer_rows(site: Site, layer: LayerPlan) -> Iterator[None]:
    """While open, the router of `site` has only the rows of the kept experts."""
    undo = cut_router(site, layer.keep)
    try:
        yield
    finally:
        undo()


def cut_router(site: Site, keep: Sequence[int], *, trainable: bool = False) -> Callable[[], None]:
    """Leave the router of `site` with the rows of the experts in `keep`, as copies.

    Args:
        trainable: the new rows are trained where the old ones were; else they are not.

    Returns:
        What brings back all rows.

    Raises:
        UnsupportedFamilyError: the router is not rows of one matrix; nothing was changed then.
    """
    if any(not buffer.is_floating_point() for buffer in site.gate.buffers()):
        raise UnsupportedFamilyError(
            f"{site.path} (family {site.family!r}): its router chooses by a table, which names experts that would go"
        )
    E, keep = site.num_experts, list(keep)
    changed: list[tuple[dict[str, Any], str, Any]] = []

    def put(where: dict[str, Any], name: str, value: Any) -> None:
        changed.append((where, name, where[name]))
        where[name] = value

    def undo() -> None:
        for where, name, value in reversed(changed):
            where[name] = value

    rows = 0
    for module in _router_modules(site):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or (axis := _expert_axis(tensor, E)) is None:
                    continue
                fewer = tensor.detach().index_select(axis, torch.tensor(keep, device=tensor.device))
                trained = trainable and tensor.requires_grad
                put(tensors, name, nn.Parameter(fewer, trained) if tensors is module._parameters else fewer)
                rows += tensor.dim() == 2 and axis == 0
        if module is site.block and not hasattr(module, "route_tokens_to_experts"):
            continue  # its sizes are those of the experts
        for name in (*KEYS["num_experts"], "out_features"):
            if type(vars(module).get(name)) is int and vars(module)[name] == E:
                put(vars(module), name, len(keep))
    if rows != 1:
        undo()
        raise UnsupportedFamilyError(
            f"{site.path} (family {site.family!r}): its router is not one matrix with a row for each of {E} "
            f"experts ({rows} found), so experts cannot be masked"
        )
    return undo


def _router_modules(site: Site) -> list[nn.Module]:
    """The gate with all in it, and the block itself: some families keep the selection bias there."""
    return [*site.gate.modules(), site.block]


def _expert_axis(tensor: Tensor, num_experts: int) -> int | None:
    """The axis over the experts: rows of a matrix, entries of a bias ``[E]`` or ``[1, E]``; None for other tensors."""
    shape = tuple(tensor.shape)
    if shape and shape[0] == num_experts:
        return 0
    return 1 if shape == (1, num_experts) else None
