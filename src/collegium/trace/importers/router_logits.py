"""Router logits as transformers models return them with ``output_router_logits=True``.

In memory, `from_router_logits` takes them as they are. On disk a file holds one forward,

    torch.save({"input_ids": ids, "attention_mask": mask, "router_logits": output.router_logits}, "forward.pt")

(the mask may be left out), or the same in safetensors with a tensor ``router_logits.{i}`` for each layer. With the
model the choice and the weights are what its gates make of these logits. Without it they are the K largest and their
softmax probabilities, which is right for plain softmax routers only: no groups, no selection bias, no renormalisation.

Legend: B sequences, S tokens of a sequence, T = B * S, N tokens that are no padding, E experts, K experts of a token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from collegium.errors import ConfigError, TraceError
from collegium.routing import Routing, router_from_gate
from collegium.routing.router import Router
from collegium.sites import sites
from collegium.trace.importers.base import (
    Block,
    Known,
    ModelFacts,
    Recording,
    importer,
    layer_entries,
    sequence_columns,
    write_recording,
)
from collegium.trace.importers.sglang import load_tensors
from collegium.trace.reader import Trace
from collegium.trace.rows import layer_rows
from collegium.trace.run import check_target
from collegium.trace.schema import LayerMeta

__all__ = ["from_router_logits", "read_router_logits"]

_PLAIN = (
    "experts are the K largest router logits and weights their softmax probabilities: right for plain softmax routers "
    "only, give the model to route as it does"
)


def from_router_logits(
    router_logits: Sequence[Tensor],
    input_ids: Tensor,
    out: str | os.PathLike[str],
    *,
    attention_mask: Tensor | None = None,
    model: Any = None,
    top_k: int | None = None,
    layers: Sequence[int] | None = None,
    overwrite: bool = False,
) -> tuple[Trace, list[str]]:
    """Write the routing of one forward, from its router logits, as a trace that also holds the logits.

    Args:
        router_logits: for each MoE layer ``[T, E]`` or ``[B, S, E]``, as in the model's output.
        input_ids: ``[B, S]``.
        out: folder for the trace.
        attention_mask: ``[B, S]``, 0 is padding and is not stored.
        model: the model that made them; its gates then say what is chosen and with what weight.
        top_k: K, needed without the model.
        layers: numbers of the decoder layers; without them, and without the model, 0, 1, ...
        overwrite: delete the trace in `out` first.

    Returns:
        The trace, and notes on what was assumed.

    Raises:
        TraceError: shapes do not fit one another, a logit is NaN or infinite, or `out` holds a trace.
        UnsupportedFamilyError: no router is known for the model's gates.
    """
    check_target(Path(out), resume=False, overwrite=overwrite)
    facts = None
    if model is not None:
        name = getattr(model, "name_or_path", "") or type(model).__name__
        facts = ModelFacts(name, sites(model)[0].family, None, {}, 0)
    known = Known(facts, model, None if layers is None else tuple(layers), top_k=top_k)
    forward = {"router_logits": tuple(router_logits), "input_ids": input_ids, "attention_mask": attention_mask}
    return write_recording(_recording([(forward, "")], known), Path(out), known, "router logits")


@importer("router-logits", reads="input_ids and router_logits of transformers forwards (.pt, .safetensors)")
def read_router_logits(files: Sequence[Path], known: Known) -> Recording:
    """See the module."""
    return _recording([(_forward(path), f"{path}: ") for path in files], known)


def _forward(path: Path) -> Mapping[str, Any]:
    if path.suffix.lower() == ".safetensors":
        try:
            tensors = load_file(path)
        except Exception as error:  # foreign bytes; what their parser raises is not ours to list
            raise TraceError(f"{path} is not a readable safetensors file: {error}") from error
        numbers = sorted(int(name[14:]) for name in tensors if name[:14] == "router_logits." and name[14:].isdigit())
        if numbers != list(range(len(numbers))):
            raise TraceError(f"{path}: field 'router_logits.{len(numbers) - 1}': its numbers have gaps: {numbers}")
        rows = tuple(tensors[f"router_logits.{number}"] for number in numbers)
        data: dict[str, Any] = {**tensors, **({"router_logits": rows} if rows else {})}
    else:
        data = load_tensors(path)
    for name in ("router_logits", "input_ids"):
        if name not in data:
            raise TraceError(f"{path}: field {name!r} is missing; there are {', '.join(map(str, data)) or 'none'}")
    if not isinstance(data["router_logits"], tuple | list) or not data["router_logits"]:
        raise TraceError(f"{path}: field 'router_logits' must be a list of tensors, one for each MoE layer")
    return data


def _recording(forwards: list[tuple[Mapping[str, Any], str]], known: Known) -> Recording:
    first, where = forwards[0]
    whole = f"{where}field 'router_logits'"
    gates = _gates(known)
    logits: Sequence[Any] = first["router_logits"]
    used = [row for row, values in enumerate(logits) if values is not None]  # None stands for a dense layer
    for row in used:
        if not isinstance(logits[row], Tensor) or logits[row].dim() < 2:
            raise TraceError(f"{where}field 'router_logits.{row}' must be a tensor [tokens, experts]")
    sizes = [logits[row].shape[-1] for row in used]
    if gates is None:
        entries = layer_entries(known, used, len(logits), whole, top_k=None, num_experts=sizes)
    else:
        entries = _fitting(gates, sizes, known, whole)
    notes = [] if gates is not None else [_PLAIN]
    routers = None if gates is None else [gates[entry.layer][1] for entry in entries]
    return Recording(entries, _blocks(forwards, used, entries, routers), logits=True, notes=notes)


def _gates(known: Known) -> dict[int, tuple[LayerMeta, Router]] | None:
    """Entry and router of each MoE layer of the model, if there is one."""
    if known.network is None:
        return None
    return {
        site.layer: (
            LayerMeta(
                layer=site.layer,
                path=site.path,
                num_experts=site.num_experts,
                top_k=site.top_k,
                score=site.score,
            ),
            router_from_gate(site.gate, block=site.block, config=getattr(known.network, "config", None)),
        )
        for site in sites(known.network)
    }


def _fitting(
    gates: dict[int, tuple[LayerMeta, Router]], sizes: list[int], known: Known, where: str
) -> tuple[LayerMeta, ...]:
    numbers = list(known.layers) if known.layers is not None else sorted(gates)
    if unknown := sorted(set(numbers) - set(gates)):
        raise ConfigError(f"layers {unknown} are no MoE layers of the model; those are {sorted(gates)}")
    if len(numbers) != len(sizes):
        raise TraceError(f"{where} holds {len(sizes)} layers, not the {len(numbers)} of the model or of --layers")
    entries = tuple(gates[number][0] for number in numbers)
    for entry, E in zip(entries, sizes, strict=True):
        if entry.num_experts != E:
            raise TraceError(f"{where}: layer {entry.layer} has {E} experts there, the model has {entry.num_experts}")
    return entries


def _blocks(
    forwards: list[tuple[Mapping[str, Any], str]],
    used: Sequence[int],
    entries: tuple[LayerMeta, ...],
    routers: Sequence[Router] | None,
) -> Iterator[Block]:
    first = 0
    for step, (forward, where) in enumerate(forwards):
        ids, mask = _tokens(forward, where)
        B, S = ids.shape
        chosen = mask.reshape(-1).nonzero().squeeze(1)
        position = mask.long().cumsum(1).sub(1).reshape(-1)[chosen].numpy()
        sequence = np.repeat(first + np.arange(B), S)[chosen.numpy()]
        rows = forward["router_logits"]
        if len(rows) <= max(used) or any(values is None for values in (rows[row] for row in used)):
            raise TraceError(f"{where}field 'router_logits' holds other layers than the first file")
        layers = []
        for place, (row, entry) in enumerate(zip(used, entries, strict=True)):
            logits = _logits(rows[row], entry, f"{where}field 'router_logits.{row}'", B * S)
            routing = _plain(logits, entry) if routers is None else _routed(routers[place], logits)
            layers.append(layer_rows(entry, routing, chosen, None, logits=True))
        yield Block(sequence_columns(ids.reshape(-1)[chosen].numpy(), sequence, position), layers, "prefill", step)
        first += B


def _tokens(forward: Mapping[str, Any], where: str) -> tuple[Tensor, Tensor]:
    """``(input_ids [B, S], mask [B, S] bool)``."""
    ids, mask = forward["input_ids"], forward.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or bool((ids < 0).any()):
        raise TraceError(f"{where}field 'input_ids' must be [sequences, tokens] of token ids")
    ids = ids.cpu()
    if mask is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise TraceError(f"{where}field 'attention_mask' must be {list(ids.shape)}, as input_ids are")
    return ids, mask.cpu().bool()


def _logits(values: Any, entry: LayerMeta, where: str, T: int) -> Tensor:
    E = entry.num_experts
    fits = isinstance(values, Tensor) and values.is_floating_point() and values.shape[-1:] == (E,)
    if not fits or values.numel() != T * E:
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise TraceError(f"{where} must be the logits of {T} tokens over {E} experts, not {shape}")
    logits = values.detach().cpu().reshape(T, E).float()
    if not bool(torch.isfinite(logits).all()):
        raise TraceError(f"{where} holds NaN or infinite logits")
    return logits


def _plain(logits: Tensor, entry: LayerMeta) -> Routing:
    probs = logits.softmax(-1)
    weight, index = probs.topk(entry.top_k, dim=-1)
    return Routing.from_topk(index, weight, entry.num_experts, full=True, logits=logits, probs=probs)


@torch.no_grad()
def _routed(router: Router, logits: Tensor) -> Routing:
    before, training = router.keep_logits, router.training
    router.keep_logits = True
    try:
        return router.eval().route(logits.to(router.weight.device))
    finally:
        router.keep_logits = before
        router.train(training)
