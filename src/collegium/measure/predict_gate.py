"""Fate's predictor: the input of one layer's router, given to the router of the next MoE layer.

Both inputs are as a rule the residual stream after an RMS norm, each with weights of its own. Those of the first norm
are divided out and those of the second put in, so that only the change of the stream in between is left. Which module
is the norm is not asked by name: it is the one whose weights, divided out of recorded inputs, leave rows of mean
square 1.

Legend: G sampled tokens, d model width, E experts, K slots, B blocks of documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from collegium.errors import TraceError
from collegium.measure.tokens import Tokens
from collegium.routing import Router, router_from_gate
from collegium.sites import Site, sites
from collegium.trace import Trace

__all__ = ["RouterNorm", "carry_over", "find_norm", "gate_recalls", "norm_at"]

Array = np.ndarray[Any, np.dtype[Any]]

TOLERANCE = 0.03  # of the root mean square of a row; bfloat16 rounds each value by up to 0.004
SAMPLE = 256  # rows that norms are checked on


@dataclass(frozen=True, eq=False)
class RouterNorm:
    """The affine map behind the normalisation in front of a router.

    Attributes:
        scale, shift: ``[d]`` float32; what the router sees is ``normalised * scale + shift``.
        place: where it was found, for `norm_at`: in the block or the decoder layer around it, the child's name, and
            whether the scale is its weight plus 1.
    """

    scale: Tensor
    shift: Tensor
    place: tuple[Literal["layer", "block"], str, bool]


@torch.no_grad()
def gate_recalls(
    trace: Trace, model: nn.Module, tokens: Tokens, held: Array
) -> dict[int, tuple[Array, Literal["corrected", "raw"]]]:
    """Hits of the "gate input" predictor on held-out tokens whose router inputs were sampled.

    The next router selects as it always does, its selection bias and expert groups included.

    Args:
        trace: with gate inputs.
        model: the traced model.
        tokens: of the trace.
        held: ``[N]`` held-out tokens, in reading order.

    Returns:
        Every layer but the first -> ``([B, 2] sums of hits and of experts, how the norms were treated)``.

    Raises:
        TraceError: the model's MoE blocks are not those of the trace.
        UnsupportedFamilyError: no router is known for its gates.
    """
    found = _matching_sites(trace, model)
    norms = _norms(trace, model, found)
    order = np.arange(len(tokens)) if tokens.order is None else tokens.order
    block, held_row = np.empty(len(tokens), np.int64), np.empty(len(tokens), np.bool_)
    block[order], held_row[order] = tokens.block, held
    results: dict[int, tuple[Array, Literal["corrected", "raw"]]] = {}
    for layer, next_layer in pairwise(trace.layers):
        site = found[next_layer]
        router = router_from_gate(site.gate, block=site.block, config=getattr(model, "config", None))
        first, second = norms[layer], norms[next_layer]
        sums = np.zeros((tokens.num_blocks, 2))
        for part in trace.iter_parts([f"gate_input_{layer}", f"expert_{next_layer}"]):
            rows, x = part.gate_inputs(layer)
            keep = held_row[rows]
            rows, inputs = rows[keep], torch.tensor(x[keep])
            if not len(rows):
                continue
            inputs = carry_over(inputs, first, second)
            experts = part.experts(next_layer)[rows - part.start]
            hits, used = _hits(router, inputs, experts, site.num_experts)
            sums += np.stack([np.bincount(block[rows], v, tokens.num_blocks) for v in (hits, used)], 1)
        results[next_layer] = sums, "raw" if first is None or second is None else "corrected"
    return results


def _matching_sites(trace: Trace, model: nn.Module) -> dict[int, Site]:
    by_path = {site.path: site for site in sites(model)}
    found = {}
    for entry in trace.meta.layers:
        site = by_path.get(entry.path)
        if site is None or site.num_experts != entry.num_experts:
            has = "no MoE block there" if site is None else f"a block of {site.num_experts} experts there"
            raise TraceError(
                f"{trace.folder}: layer {entry.layer} is {entry.path!r} with {entry.num_experts} experts, and the "
                f"model has {has}; give the model that was traced ({trace.meta.model})"
            )
        found[entry.layer] = site
    return found


def _hits(router: Router, inputs: Tensor, experts: Array, E: int) -> tuple[Array, Array]:
    """``[G]`` experts of each token that the router names for `inputs`, and ``[G]`` experts it has."""
    guess = router(inputs.to(router.weight.device)).to_topk()[0].cpu().numpy()
    used = experts < E
    hits = (experts[:, :, None] == guess[:, None, :]).any(2) & used
    return hits.sum(1), used.sum(1)


def _norms(trace: Trace, model: nn.Module, found: dict[int, Site]) -> dict[int, RouterNorm | None]:
    """The norm before each layer's router, None where none is found."""
    samples: dict[int, Array] = {}
    for part in trace.iter_parts([f"gate_input_{layer}" for layer in trace.layers]):
        samples = {layer: part.gate_inputs(layer)[1][:SAMPLE] for layer in trace.layers}
        if all(len(x) for x in samples.values()):
            break
    return {
        layer: find_norm(model, site, torch.tensor(samples[layer])) if len(samples.get(layer, ())) else None
        for layer, site in found.items()
    }


def find_norm(model: nn.Module, site: Site, x: Tensor) -> RouterNorm | None:
    """The norm in front of a router: of all that stand there, the one that recorded inputs undo.

    Args:
        model: that `site` is of.
        site: of the router.
        x: ``[G, d]`` some inputs of the router, at least one.

    Returns:
        None where no ``[d]`` weight beside or around the block leaves rows of mean square 1.
    """
    best, least = None, TOLERANCE
    x = x.float().cpu()
    for one in _norms_around(model, site, x.shape[1:]):
        # rows of a tiny residual stream have less than 1, because of the norm's epsilon: hence the median
        rms = ((x - one.shift) / one.scale).square().mean(1).sqrt()
        error = float((rms - 1).abs().median())
        if error < least:
            best, least = one, error
    return best


def norm_at(model: nn.Module, site: Site, like: RouterNorm) -> RouterNorm | None:
    """The norm in the place of `like` at another layer, for a router whose inputs are not known yet; None if there is
    none."""
    return next((one for one in _norms_around(model, site, like.scale.shape) if one.place == like.place), None)


def carry_over(x: Tensor, first: RouterNorm | None, second: RouterNorm | None) -> Tensor:
    """``x [G, d]`` behind the norm `first` -> behind the norm `second`; as it is where one of them is not known."""
    if first is None or second is None:
        return x
    first_scale, first_shift, scale, shift = (
        t.to(x.device) for t in (first.scale, first.shift, second.scale, second.shift)
    )
    return (x - first_shift) / first_scale * scale + shift


def _norms_around(model: nn.Module, site: Site, shape: torch.Size) -> Iterator[RouterNorm]:
    """Every weight of `shape` in the decoder layer and the block, as it is and plus 1."""
    owners: tuple[tuple[Literal["layer", "block"], nn.Module], ...] = (
        ("layer", model.get_submodule(site.path.rpartition(".")[0])),
        ("block", site.block),
    )
    for where, owner in owners:
        for name, module in owner.named_children():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if not isinstance(weight, Tensor) or weight.shape != shape:
                continue
            weight = weight.detach().float().cpu()
            shift = bias.detach().float().cpu() if isinstance(bias, Tensor) else torch.zeros_like(weight)
            for plus_one in (False, True):
                yield RouterNorm(weight + 1 if plus_one else weight, shift, (where, name, plus_one))
