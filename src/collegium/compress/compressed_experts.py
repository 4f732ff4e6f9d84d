"""Compressed Experts (2025): the auxiliary experts of a token become vectors that modulate its main ones.

Of the K experts a token chooses, sorted by weight, the first K - n stay; each of the last n is three vectors, which
scale what goes into the gate and the up projection of the main experts and what comes out of their activation. That
saves compute, not memory: every expert stays, as any may be a main one.

Legend: T tokens, K slots of a token, E experts, n compressed slots, d model width, f expert width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from collegium.catalog import method
from collegium.errors import ConfigError, NonFiniteError, UnsupportedFamilyError
from collegium.experts.from_module import expert_weights
from collegium.experts.weights import ExpertWeights
from collegium.routing import Routing
from collegium.sites import Site, sites
from collegium.sites.adapters.loose import Loose
from collegium.sites.adapters.seam import Seam
from collegium.trace.run import Batch, batch_ids

__all__ = ["VECTORS", "install_compressed", "tune_compressed"]

VECTORS = ("ce_gate", "ce_hidden", "ce_up")
"""The new parameters of an experts module, ``[E, d]``, ``[E, f]`` and ``[E, d]``: the paper's c_0, c_1 and c_2."""


@method("compressed_experts", kind="compaction", paper="Compressed Experts (2025)", arxiv="2503.00634")
def install_compressed(model: PreTrainedModel, n_ce: int) -> PreTrainedModel:
    """Let the last `n_ce` experts of every token be vectors, in every MoE block, in place.

    The vectors are ones at first: then the model is the one that drops a token's last `n_ce` experts and leaves the
    other weights as they are. `save_own_model` writes it, `load_own` reads it.

    Source: Compressed Experts (2025, arXiv 2503.00634). There the vector between the projections is cut from one of
    width d; here it has the width of the experts.

    Raises:
        ConfigError: `n_ce` does not leave an expert, or the model is changed by us already.
        UnsupportedFamilyError: the experts are not gated, or not behind transformers' experts interface.
    """
    section = getattr(model.config, "collegium", None) or {
        "version": 1,
        "base": model.config.model_type,
        "shrunk": {"layers": [], "compressed": None},
    }
    if "shrunk" not in section or section["shrunk"]["compressed"] is not None:
        raise ConfigError(
            "this model has MoE blocks of ours or compressed experts already; start from a plain or shrunk one"
        )
    found = sites(model)
    for site in found:
        _check(site, n_ce)
    for site in found:
        _install(site.experts, n_ce)
    # what `collegium.compress.own` writes and reads
    model.config.collegium = section | {"shrunk": section["shrunk"] | {"compressed": n_ce}}
    return model


def _check(site: Site, n_ce: int) -> None:
    if not isinstance(site.adapter, Seam) or isinstance(site.adapter, Loose):
        raise UnsupportedFamilyError(
            f"{site.path} (family {site.family!r}) is not behind transformers' experts interface; its experts cannot "
            "be compressed"
        )
    if not 0 < n_ce < site.top_k:
        raise ConfigError(
            f"{site.path}: of {site.top_k} experts a token, 1 to {site.top_k - 1} can be compressed, not {n_ce}"
        )
    if not expert_weights(site.experts).gated:
        raise UnsupportedFamilyError(f"{site.path} (family {site.family!r}): its experts have no gate to modulate")


def _install(experts: Any, n_ce: int) -> None:
    weights = expert_weights(experts)
    E, f, d = weights.down_t.shape
    for name, width in zip(VECTORS, (d, f, d), strict=True):
        ones = torch.ones(E, width, dtype=weights.up.dtype, device=weights.up.device)
        experts.register_parameter(name, nn.Parameter(ones))
    # on the object: the class serves other models too
    experts.forward = partial(_forward, experts, n_ce)


def _forward(module: Any, n_ce: int, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``[T, d]`` the weighted sum of each token's main experts, modulated by its auxiliary ones."""
    weights = expert_weights(module)
    E = weights.num_experts
    weight, order = top_k_weights.sort(dim=1, descending=True, stable=True)
    index = top_k_index.gather(1, order)
    main = max(index.shape[1] - n_ce, 0)
    c_gate, c_hidden, c_up = _modulation(module, index[:, main:], weight[:, main:], E)
    x_gate, x_up = hidden_states * c_gate, hidden_states * c_up
    routing = Routing.from_topk(index[:, :main], weight[:, :main], E)
    dispatch = routing.dispatch()
    exact = torch.promote_types(torch.promote_types(hidden_states.dtype, weights.up.dtype), torch.float32)
    y = torch.zeros(hidden_states.shape, dtype=exact, device=hidden_states.device)
    for e, (first, last) in enumerate(pairwise(dispatch.offsets.tolist())):
        if first == last:
            continue
        token = dispatch.token[first:last]
        out = _expert(weights, e, x_gate[token], x_up[token], c_hidden[token])
        y = y.index_add(0, token, (out * routing.weight[dispatch.order[first:last], None]).to(exact))
    return y.to(hidden_states.dtype)


def _modulation(module: Any, index: Tensor, weight: Tensor, E: int) -> list[Tensor]:
    """``[T, d], [T, f], [T, d]``: of each token the mean vectors of its auxiliary experts, by their weights. Ones where
    it has none."""
    used = index < E
    weight = weight * used
    total = weight.sum(1, keepdim=True)
    share = weight / total.where(total != 0, 1)
    idle = (total == 0).to(weight.dtype)
    found = []
    for name in VECTORS:
        vectors = getattr(module, name)
        mixed = torch.einsum("tk,tkn->tn", share.to(vectors.dtype), vectors[index.clamp(max=E - 1)])
        found.append(mixed + idle.to(vectors.dtype))
    return found


def _expert(weights: ExpertWeights, e: int, x_gate: Tensor, x_up: Tensor, c: Tensor) -> Tensor:
    """``[A, d]`` one modulated expert, before its combine weight."""
    up_t, f = weights.up_t[e], weights.down_t.shape[1]
    halves = (slice(0, None, 2), slice(1, None, 2)) if weights.interleaved else (slice(0, f), slice(f, None))
    gate, up = x_gate @ up_t[:, halves[0]], x_up @ up_t[:, halves[1]]
    hidden = torch.stack([gate, up], -1).flatten(-2) if weights.interleaved else torch.cat([gate, up], -1)
    if weights.up_bias is not None:
        hidden = hidden + weights.up_bias[e]
    out = (weights.activation(hidden) * c) @ weights.down_t[e]
    if weights.down_bias is not None:
        out = out + weights.down_bias[e]
    return out if weights.post_norm is None else weights.post_norm(out)


def tune_compressed(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    steps: int = 300,
    lr: float = 1e-4,
    train: Literal["ce_only", "all"] = "all",
) -> list[float]:
    """Fine-tune a model with compressed experts on text: AdamW, language-model loss, batch after batch, again from the
    first when they end. The paper trains everything ("all").

    Returns:
        The loss of every step, before its update.

    Raises:
        ConfigError: the model has no compressed experts, or there is no batch.
        NonFiniteError: the loss became NaN or infinite.
    """
    batches = list(batches)
    vectors = [p for name, p in model.named_parameters() if name.rpartition(".")[2] in VECTORS]
    if not vectors or not batches or steps < 1:
        raise ConfigError(f"{len(vectors)} vectors of compressed experts, {len(batches)} batches and {steps} steps")
    before, training = [(p, p.requires_grad) for p in model.parameters()], model.training
    trained = vectors if train == "ce_only" else [p for p in model.parameters() if p.requires_grad]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    device, losses = next(model.parameters()).device, []
    model.train()
    try:
        for step, batch in enumerate(itertools.islice(itertools.cycle(batches), steps)):
            ids, mask = batch_ids(batch, device)
            loss = model(
                input_ids=ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100), use_cache=False
            ).loss
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"the loss of step {step} is {float(loss)}; take a smaller lr than {lr:g}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    finally:
        model.train(training)
        for parameter, was in before:
            parameter.requires_grad_(was)
    return losses
