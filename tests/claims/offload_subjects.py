"""What the claims about running in little memory share: models, their traces, and a model of two precisions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collegium.experts.compute import compute
from collegium.experts.from_module import expert_weights
from collegium.experts.stored import ExpertLayout
from collegium.experts.weights import ExpertWeights
from collegium.offload.cache import ExpertCache, Found
from collegium.offload.geometry import Array, Geometry
from collegium.offload.policies.base import Use
from collegium.offload.policies.lru import LRU
from collegium.offload.precision.base import Choice, PrecisionPolicy
from collegium.offload.simulation import SimulationSettings
from collegium.routing import Routing
from collegium.sites import sites
from collegium.trace import Trace

__all__ = ["Subject", "TwoCopies"]

GROUP = 32


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, and traces of several parts of the documents it was not trained on.

    Attributes:
        sequences: token ids ``[1, S]`` of the first part.
    """

    name: str
    model: Any
    traces: list[Trace]
    sequences: list[Tensor]

    @property
    def geometry(self) -> Geometry:
        return Geometry.of_trace(self.traces[0].meta)


class _Pool:
    """The cache of one copy, asked token by token; counts what is read."""

    def __init__(self, geometry: Geometry, capacity: int) -> None:
        self.cache = ExpertCache(geometry, capacity, LRU().build(geometry, capacity))
        self.reads = 0

    def ask(self, layer: int, experts: Array, weights: Array) -> None:
        order = np.argsort(-weights, kind="stable")
        left = experts[order].astype(np.int64)
        while len(left):
            request = self.cache.request(layer, left)
            for expert in request.experts[request.found == Found.MISS].tolist():
                self.cache.arrived(layer, expert)
                self.reads += 1
            self.cache.release(layer, request.experts)
            left = request.left
        ones = np.ones(len(order))
        self.cache.finish(Use(layer, experts[order], weights[order], ones, ones > 0, None, 1))


class TwoCopies:
    """A model whose experts are computed from records of 8 and of 4 bits, each assignment from the copy that a policy
    chooses, with what is in memory followed token by token as in decoding.

    Attributes:
        nbytes: of a record of each copy.
    """

    def __init__(self, subject: Subject, ratio: float) -> None:
        self.model, self.geometry, self.ratio = subject.model, subject.geometry, ratio
        self._experts = [site.experts for site in sites(subject.model)]
        self._copies: list[dict[int, ExpertWeights]] = []
        for experts in self._experts:
            weights = expert_weights(experts)
            u, d = weights.up_t.shape[2], weights.up_t.shape[1]
            layouts = {8: ExpertLayout(d, u // 2, bits=8), 4: ExpertLayout(d, u // 2, bits=4, group=GROUP)}
            self.nbytes = {bits: layout.nbytes for bits, layout in layouts.items()}
            self._copies.append({bits: _stored(weights, layout) for bits, layout in layouts.items()})

    @contextmanager
    def running(self, policy: PrecisionPolicy | None) -> Iterator[dict[int, _Pool]]:
        """Compute by a policy; None is 8 bits for all, with nobody asked. Yields the pool of each copy."""
        slots = {8: 1}
        if policy is not None:
            capacity = int(self.ratio * sum(self.geometry.top_k))
            slots = SimulationSettings(LRU(), capacity, self.nbytes).slots(self.geometry, policy.used_bits)
        pools = {bits: _Pool(self.geometry, count) for bits, count in slots.items() if policy is not None}
        for layer, experts in enumerate(self._experts):
            experts.forward = self._forward(layer, policy, pools)
        try:
            yield pools
        finally:
            for experts in self._experts:
                del experts.forward

    def _forward(self, layer: int, policy: PrecisionPolicy | None, pools: dict[int, _Pool]) -> Any:
        E = self.geometry.experts[layer]

        def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            if policy is None:
                return compute(x, Routing.from_topk(index, weight, E), self._copies[layer][8])
            chosen = torch.from_numpy(self._choose(layer, policy, pools, index.numpy(), weight.float().numpy()))
            parts = [
                compute(x, Routing.from_topk(torch.where(chosen == bits, index, E), weight, E), copy)
                for bits, copy in self._copies[layer].items()
                if bool((chosen == bits).any())
            ]
            return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

        return forward

    def _choose(self, layer: int, policy: PrecisionPolicy, pools: dict[int, _Pool], ids: Array, w: Array) -> Array:
        exact = pools[policy.used_bits[0]].cache
        chosen = np.empty(ids.shape, np.uint8)
        for t in range(len(ids)):
            row = slice(t, t + 1)
            chosen[row] = policy.choose(Choice(layer, ids[row], w[row], exact.is_resident(layer), decode=True))
            for bits, pool in pools.items():
                if (mine := chosen[t] == bits).any():
                    pool.ask(layer, ids[t][mine], w[t][mine])
        return chosen


def _stored(weights: ExpertWeights, layout: ExpertLayout) -> ExpertWeights:
    """The weights as they come back from records."""
    read = []
    for expert in range(weights.num_experts):
        record = torch.zeros(layout.nbytes, dtype=torch.uint8)
        layout.write(record, weights.up_t[expert].T.detach(), weights.down_t[expert].T.detach())
        read.append(layout.read(record))
    up, down = (torch.stack([one[name] for one in read]) for name in ("up", "down"))
    return replace(weights, up=up, down=down, transposed=False)
