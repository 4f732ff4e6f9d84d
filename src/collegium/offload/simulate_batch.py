"""`batched`: the sequences of a trace run together, as they come or regrouped by the experts they use.

Of a batch each pass holds a token of every sequence. To regroup, two batches run in turn, and before each round of both
their sequences are dealt out anew (ExpertFlow). A sequence that ends makes room for the next one, prompts run alone
before that, and of the last sequences, when fewer than two batches are left, each batch gets half.

Legend: N rows, S sequences that run, B of them in a batch, K slots, E experts of a layer, P sum of E over layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from collegium.errors import ConfigError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.predictors.base import Moment, Predictor
from collegium.offload.schedule.regroup import Regroup
from collegium.offload.simulate_passes import Passes

__all__ = ["batched", "distinct_experts", "predicted_experts"]


def batched(
    passes: Passes,
    size: int,
    batches: int = 1,
    regroup: Regroup | None = None,
    experts: Sequence[Array] | None = None,
) -> Passes:
    """The same tokens with several sequences in a pass.

    Args:
        passes: of single sequences.
        size: B.
        batches: 1, or 2 that run in turn.
        regroup: how two batches are dealt out; None leaves each sequence in its own.
        experts: of each layer ``[N, K]``, by which they are dealt out; None is those that the rows use, which before
            the pass only an oracle knows.

    Raises:
        ConfigError: `size` is below 1, the passes hold several sequences already, or there is but one batch to regroup.
    """
    if size < 1:
        raise ConfigError(f"a batch of {size} sequences is none; give at least 1")
    if passes.by not in ("tokens", "sequences"):
        raise ConfigError("passes as recorded are batches already; batch the tokens of single sequences")
    if regroup is not None and (batches != 2 or size < 2):
        raise ConfigError(f"{batches} batches of {size} sequences leave nothing to regroup; it takes 2 of at least 2")
    experts = passes.experts if experts is None else experts
    starts = np.flatnonzero(passes.fresh).tolist()
    waiting = deque(map(range, starts, [*starts[1:], len(passes)]))
    seats: list[deque[int]] = [deque() for _ in range(size * batches)]
    groups: list[list[int]] = []
    while waiting or any(seats):
        for seat in seats:
            while not seat and waiting:
                seat.extend(waiting.popleft())
                groups += _prompt(seat, passes)
        now = [seat.popleft() for seat in seats if seat]
        if len(now) > size:
            half = (len(now) + 1) // 2
            order = range(len(now)) if regroup is None else _dealt(regroup, passes, experts, now)
            dealt = [now[at] for at in order]
            groups += [dealt[:half], dealt[half:]]
        elif now:
            groups.append(now)
        for seat in seats:
            groups += _prompt(seat, passes)
    return passes.arranged(groups)


def _prompt(seat: deque[int], passes: Passes) -> list[list[int]]:
    """The passes of a prompt that a sequence comes to, each alone."""
    found = []
    while seat and not passes.decode[seat[0]]:
        found.append([seat.popleft()])
    return found


def _dealt(regroup: Regroup, passes: Passes, experts: Sequence[Array], now: list[int]) -> list[int]:
    """Places in `now`: those of the larger batch, then the others. Of an odd number one place is empty."""
    paths = np.zeros((len(now) + len(now) % 2, passes.geometry.total), np.bool_)
    for at, number in enumerate(now):
        rows = slice(int(passes.edges[number]), int(passes.edges[number + 1]))
        paths[at] = _path(passes.geometry, experts, rows)
    order = regroup.order(paths).tolist()
    half = len(order) // 2
    first, second = ([at for at in part if at < len(now)] for part in (order[:half], order[half:]))
    return first + second if len(first) >= len(second) else second + first


def _path(geometry: Geometry, experts: Sequence[Array], rows: slice) -> Array:
    """``[P]`` bool: the experts that any of some rows uses."""
    path = np.zeros(geometry.total, np.bool_)
    for layer, E in enumerate(geometry.experts):
        ids = experts[layer][rows].reshape(-1)
        path[geometry.keys(layer)][ids[ids < E]] = True
    return path


def predicted_experts(passes: Passes, predictor: Predictor) -> list[Array]:
    """Of each layer ``[N, K]`` the experts that a predictor names before a pass of a single sequence begins.

    Raises:
        ConfigError: it does not know all layers by then.
    """
    geometry = passes.geometry
    found = [np.zeros((len(passes.rows), K), np.int64) for K in geometry.top_k]
    for number in range(len(passes)):
        if passes.fresh[number]:
            predictor.begin()
        rows = slice(int(passes.edges[number]), int(passes.edges[number + 1]))
        predictions = predictor.predict(Moment(-1, passes.tokens[rows]))
        if [one.layer for one in predictions] != list(range(geometry.num_layers)):
            raise ConfigError(
                "to regroup by what is predicted takes a predictor that knows all layers before the first one runs, "
                "such as routing_path or token_id"
            )
        for one, ids, K in zip(predictions, found, geometry.top_k, strict=True):
            ids[rows] = np.argsort(-one.scores, kind="stable")[:K]
    return found


def distinct_experts(passes: Passes) -> float:
    """Mean number of distinct experts that a layer of a pass of decoding asks for."""
    steps = [
        len(passes.step(number, layer).experts)
        for number in np.flatnonzero(passes.decode).tolist()
        for layer in range(passes.geometry.num_layers)
    ]
    return float(np.mean(steps)) if steps else 0.0
