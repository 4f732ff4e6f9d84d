"""How many of the experts that tokens use does a predictor name ahead of time?

Legend: N tokens, K slots, E experts of a layer, L layers, B blocks of documents.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from collegium.errors import TraceError
from collegium.measure.estimate import Estimate
from collegium.measure.information import means
from collegium.measure.tokens import Tokens, read_tokens
from collegium.offload.geometry import Array, Geometry
from collegium.offload.predictors.base import Gates, Moment, PredictorSettings
from collegium.offload.predictors.rows import Fitted, Rows
from collegium.trace import Trace

__all__ = ["Recall", "recall"]


@dataclass(frozen=True)
class Recall:
    """Recall of one layer at one distance.

    Attributes:
        layer: number of the decoder layer that is predicted.
        distance: layers ahead; from before the first layer, the first layer is at distance 1.
        value: share of the tokens' experts that were among the named ones.
    """

    layer: int
    distance: int
    value: Estimate


def recall(
    settings: PredictorSettings,
    trace: Trace,
    *,
    gates: Gates | None = None,
    width: int | None = None,
    max_tokens: int | None = None,
) -> list[Recall]:
    """Recall of a predictor that is fitted on half of the documents, on the tokens of the others, one token a pass.

    Where the trace has router inputs, only tokens that have them are judged, whatever the predictor: so predictors
    are compared on the same tokens.

    Args:
        gates: of the traced model, for predictors that ask its routers; the trace must then have router inputs.
        width: experts named for a token; None is each layer's K.
        max_tokens: judge no more than the first so many held-out tokens.

    Returns:
        Every layer and distance it spoke of, nearest first, then by layer.

    Raises:
        TraceError: the trace is of one document, or lacks the router inputs that are needed.
        ConfigError: `gates` are needed.
    """
    if settings.needs_gates and not trace.meta.has("gate_input"):
        raise TraceError(f"{trace.folder} has no router inputs; record it with them to judge {type(settings).__name__}")
    geometry, tokens = Geometry.of_trace(trace.meta), read_tokens(trace)
    if tokens.num_documents < 2:
        raise TraceError(f"{trace.folder}: predictors are fitted on some documents and judged on others; it has one")
    held = tokens.block % 2 == 1
    if isinstance(settings, Fitted) and settings.needs_trace:
        predictor = settings.fit(geometry, Rows.of(trace, ~held, tokens))
    else:
        predictor = settings.build(geometry, trace=trace, gates=gates)
    at = np.flatnonzero(held)[:max_tokens]
    rows = Rows.of(trace, np.isin(np.arange(len(tokens)), at), tokens)
    inputs = _gate_inputs(trace, tokens, at)
    sums: dict[tuple[int, int], Array] = defaultdict(lambda: np.zeros((tokens.num_blocks, 2)))
    for run in rows.runs():
        predictor.begin()
        for n in range(run.start, run.stop):
            x = None if inputs is None else inputs.get(n)
            experts = [used[n : n + 1] for used in rows.experts]
            for layer in range(-1, geometry.num_layers - 1):
                moment = Moment(
                    layer, rows.tokens[n : n + 1], experts[: layer + 1], None if x is None or layer < 0 else x[layer]
                )
                for found in predictor.predict(moment):
                    if inputs is None or x is not None:
                        K = width or geometry.top_k[found.layer]
                        hits = _hits(found.scores, experts[found.layer][0], K)
                        sums[found.layer - layer, found.layer][tokens.block[at[n]]] += hits
    return [
        Recall(geometry.layers[layer], distance, means(sums[distance, layer], (0, 1))[0])
        for distance, layer in sorted(sums)
    ]


def _hits(scores: Array, experts: Array, K: int) -> tuple[int, int]:
    """Experts of a token among the K best scores, of equals the lower id first; and how many it has."""
    used = experts[experts < len(scores)]
    best = np.argsort(-scores, kind="stable")[:K]
    return int(np.isin(used, best).sum()), len(used)


def _gate_inputs(trace: Trace, tokens: Tokens, at: Array) -> dict[int, list[torch.Tensor]] | None:
    """Index in `at` -> ``[1, d]`` inputs of every layer's router, of the tokens that have them; None without any."""
    if not trace.meta.has("gate_input"):
        return None
    recorded = at if tokens.order is None else tokens.order[at]
    index = {row: n for n, row in enumerate(recorded.tolist())}
    found: dict[int, list[torch.Tensor]] = defaultdict(list)
    for layer in trace.layers:
        for part in trace.iter_parts([f"gate_input_{layer}"]):
            rows, x = part.gate_inputs(layer)
            for row, vector in zip(rows.tolist(), x, strict=True):
                if row in index:
                    found[index[row]].append(torch.tensor(vector[None]))
    return dict(found)
