"""From tensors of one forward to the rows of a trace, vectorised.

Legend: B sequences, S tokens of a sequence, T = B * S, N rows that are stored, A assignments, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collegium.errors import ConfigError, ModelError, NonFiniteError
from collegium.routing import Routing
from collegium.trace.schema import LayerMeta
from collegium.trace.store import LayerRows

__all__ = ["in_sequence", "layer_rows", "spread"]

Array = np.ndarray[Any, np.dtype[Any]]


def layer_rows(
    layer: LayerMeta,
    routing: Routing,
    chosen: Tensor,
    gate_input: Tensor | None,
    logits: bool,
    dropped: bool = False,
) -> LayerRows:
    """The rows of the tokens ``chosen [N]`` in one layer; with `dropped` also what a capacity limit took away.

    Raises:
        NonFiniteError: a combine weight is NaN or infinite.
        ModelError: logits are asked for and the model's family does not give them.
    """
    everyone = len(chosen) == routing.num_tokens
    rows = chosen.to(routing.expert.device)
    lengths = None
    if routing.slots is not None and routing.kept is None:
        index, value = routing.index_TK, routing.weight_TK
        index, value = (index, value) if everyone else (index[rows], value[rows])
    else:
        index, value, lengths = _ragged(routing, rows, routing.kept)
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(
            f"{layer.path} (layer {layer.layer}): the router gives combine weights that are NaN or infinite; a weight "
            "of the model is probably damaged, `collegium inspect --verify` names it"
        )
    if logits and routing.logits is None:
        raise ModelError(f"{layer.path}: this family does not give its router's logits; record without them")
    # sent to the CPU in the smallest type torch has for it
    small = torch.uint8 if layer.num_experts <= 256 else torch.int32
    lost, lost_lengths = None, None
    if dropped and routing.kept is not None:
        lost, _, lost_lengths = _ragged(routing, rows, ~routing.kept)
    scores = routing.logits if logits else None
    return LayerRows(
        expert=index.to(small).reshape(-1).cpu().numpy(),
        weight=value.reshape(-1).to(torch.float16).cpu().numpy(),
        lengths=lengths,
        logits=None if scores is None else (scores if everyone else scores[rows]).to(torch.float16).cpu().numpy(),
        gate_input=None if gate_input is None else gate_input.cpu().numpy(),
        dropped=None if lost is None else lost.to(small).cpu().numpy(),
        dropped_lengths=lost_lengths,
    )


def in_sequence(routings: Sequence[Routing]) -> Routing:
    """What a layer decided in its iterations as one record: the assignments of a token in the first of them, then
    those in the second, and so on. A token may then name an expert once for each; logits and probabilities, which are
    of one routing, are left out where there are several."""
    first = routings[0]
    if len(routings) == 1:
        return first
    token = torch.cat([one.token for one in routings])
    order = token.argsort(stable=True)
    kept = None
    if any(one.kept is not None for one in routings):
        kept = torch.cat([torch.ones_like(one.expert) > 0 if one.kept is None else one.kept for one in routings])[order]
    slots = [one.slots for one in routings if one.slots is not None]
    return Routing(
        expert=torch.cat([one.expert for one in routings])[order],
        weight=torch.cat([one.weight for one in routings])[order],
        num_tokens=first.num_tokens,
        num_experts=first.num_experts,
        slots=sum(slots) if len(slots) == len(routings) else None,
        ragged_token=token[order],
        kept=kept,
    )


def _ragged(routing: Routing, rows: Tensor, among: Tensor | None) -> tuple[Tensor, Tensor, Array]:
    """``(expert [A], weight [A], lengths [N])`` of the assignments that ``among [A]`` is true for; None is all."""
    stored = torch.zeros(routing.num_tokens, dtype=torch.bool, device=rows.device)
    stored[rows] = True
    use = stored[routing.token]
    if among is not None:
        use &= among
    lengths = torch.bincount(routing.token[use], minlength=routing.num_tokens)[rows]
    return routing.expert[use], routing.weight[use], lengths.cpu().numpy()


def spread(values: Any, B: int, S: int) -> Array:
    """``[B]`` or ``[B, S]`` whole numbers as ``[T]``.

    Raises:
        ConfigError: the shape is another.
    """
    array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.shape == (B,):
        return np.repeat(array, S)
    if array.shape != (B, S):
        raise ConfigError(f"a column of a batch must be [{B}] or [{B}, {S}], not {list(array.shape)}")
    return array.reshape(-1)
