"""Fate's predictor: the input of one layer's router, given to the router of the next MoE layer.

Both inputs are as a rule the residual stream after an RMS norm, each with weights of its own. Those of the first norm
are divided out and those of the second put in, so that only the change of the stream in between is left. Which module
is the norm is not asked by name: it is the one whose weights, divided out of recorded inputs, leave rows of mean
square 1.

Legend: G sampled tokens, d model width, E experts, K slots, B blocks of documents.
"""

from __future__ import annotations

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

__all__ = ["gate_recalls"]

Array = np.ndarray[Any, np.dtype[Any]]
Norm = tuple[Tensor, Tensor]
"""``(weight [d], bias [d])`` of an affine map behind a normalisation, float32."""

TOLERANCE = 0.03  # of the root mean square of a row; bfloat16 rounds each value by up to 0.004
SAMPLE = 256  # rows that norms are checked on


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
            if first is not None and second is not None:
                inputs = (inputs - first[1]) / first[0] * second[0] + second[1]
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


def _norms(trace: Trace, model: nn.Module, found: dict[int, Site]) -> dict[int, Norm | None]:
    """The norm before each layer's router, None where none is found."""
    samples: dict[int, Array] = {}
    for part in trace.iter_parts([f"gate_input_{layer}" for layer in trace.layers]):
        samples = {layer: part.gate_inputs(layer)[1][:SAMPLE] for layer in trace.layers}
        if all(len(x) for x in samples.values()):
            break
    return {
        layer: _norm(model, site, torch.tensor(samples[layer])) if len(samples.get(layer, ())) else None
        for layer, site in found.items()
    }


def _norm(model: nn.Module, site: Site, x: Tensor) -> Norm | None:
    """Of all ``[d]`` weights in the decoder layer, as they are or plus 1: those that undo the norm of ``x [G, d]``."""
    best, least = None, TOLERANCE
    for owner in (model.get_submodule(site.path.rpartition(".")[0]), site.block):
        for module in owner.children():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if not isinstance(weight, Tensor) or weight.shape != x.shape[1:]:
                continue
            shift = bias.float().cpu() if isinstance(bias, Tensor) else torch.zeros(x.shape[1])
            for scale in (weight.float().cpu(), 1 + weight.float().cpu()):
                # rows of a tiny residual stream have less than 1, because of the norm's epsilon: hence the median
                rms = ((x - shift) / scale).square().mean(1).sqrt()
                error = float((rms - 1).abs().median())
                if error < least:
                    best, least = (scale, shift), error
    return best
