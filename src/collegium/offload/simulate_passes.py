"""`Passes`: the forward passes that a trace stands for, and what each layer of each of them asks for.

A trace says which step computed a row, but a simulation is mostly about something else than the run that recorded it:
texts that were read as prompts stand for texts to be generated. So a pass is one of

* "tokens": a single token. Every row is unrolled, sequence by sequence.
* "sequences": what one step computed of one sequence: a prompt (or a chunk of it), then single tokens.
* "recorded": all rows of one step, as they were batched.

`collegium.offload.simulate_batch` makes passes of several sequences from those of single ones.

Legend: N rows, P passes, L layers, T tokens of a pass, K slots, E experts of a layer, n distinct experts of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from collegium.errors import ConfigError, TraceError
from collegium.offload.geometry import Array, Geometry
from collegium.offload.policies.opt import Stream
from collegium.offload.schedule import load_order
from collegium.trace import Trace
from collegium.trace.schema import PHASES

if TYPE_CHECKING:
    import torch

__all__ = ["Passes", "PassesBy", "Step", "recorded_gate_inputs"]

PassesBy = Literal["auto", "tokens", "sequences", "recorded"]

_PREFILL = PHASES.index("prefill")


@dataclass(frozen=True, eq=False)
class Step:
    """What one layer of one pass asks for.

    Attributes:
        experts: ``[n]`` distinct ids, ascending.
        weights: ``[n]`` float32 sum over tokens of the combine weights.
        counts: ``[n]`` tokens that use each.
        order: ``[n]`` places in `experts` in the order to ask for them, as `load_order` has it where nothing is
            resident; the cache puts residents first.
    """

    experts: Array
    weights: Array
    counts: Array
    order: Array

    @classmethod
    def of(cls, experts: Array, weights: Array, E: int) -> Step:
        """Of a pass's ``[T, K]`` experts, ids >= E being unused slots, and weights; summed as the engine does."""
        ids = experts.T.reshape(-1)
        order = np.argsort(ids, kind="stable")
        order = order[ids[order] < E]
        distinct, first, counts = np.unique(ids[order], return_index=True, return_counts=True)
        mass = np.zeros(0, np.float32)
        if len(distinct):
            mass = np.add.reduceat(weights.T.reshape(-1)[order], first)
        order = load_order(np.zeros(len(distinct), np.bool_), mass, counts, len(experts))
        return cls(distinct.astype(np.int64), mass, counts, order)


class Passes:
    """The passes of a trace, in the order to run them.

    Args:
        trace: any.
        by: what a pass is; "auto" is "sequences" where the trace holds rows of decoding, and else "tokens".
        max_tokens: only so many of the first rows, in the order of the passes.
        probabilities: keep the routers' probabilities, if their logits were recorded.

    Attributes:
        by: what a pass is; "batches" where `arranged` made them.
        unrolled: prompts are run token by token, as if they had been generated.
        edges: ``[P + 1]``: pass p has rows ``edges[p] .. edges[p + 1] - 1``.
        fresh: ``[P]`` bool: it begins a sequence.
        decode: ``[P]`` bool: it holds no row of a prompt, or prompts are unrolled.
        tokens: ``[N]`` token ids.
        rows: ``[N]`` row of the trace of each.
        experts, weights: of each layer ``[N, K]``; weights float32.

    Raises:
        TraceError: the trace is empty, or holds weights that are not finite.
        ConfigError: `max_tokens` is below 1.
    """

    def __init__(
        self, trace: Trace, by: PassesBy = "auto", max_tokens: int | None = None, probabilities: bool = False
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"a simulation of {max_tokens} tokens is none; give at least 1")
        sequence, position, step, phase, token = (
            trace.column(name) for name in ("sequence", "position", "step", "phase", "token")
        )
        if not len(token):
            raise TraceError(f"{trace.folder}: the trace holds no tokens, so there is nothing to simulate")
        prompt = phase == _PREFILL
        self.by: str = by if by != "auto" else "tokens" if prompt.all() else "sequences"
        self.unrolled = self.by == "tokens" and bool(prompt.any())
        keys = (position, sequence, step) if self.by == "recorded" else (position, step, sequence)
        self.rows = np.lexsort(keys)[:max_tokens]
        sequence, step, prompt = (column[self.rows] for column in (sequence, step, prompt))
        self.tokens = token[self.rows].astype(np.int64)
        N = len(self.rows)
        cut = np.ones(N, np.bool_)
        if self.by != "tokens":
            cut[1:] = step[1:] != step[:-1]
        if self.by == "sequences":
            # tokens of one step share a pass only within a prompt or a draft, of which each sequence has its own
            cut[1:] |= sequence[1:] != sequence[:-1]
        self.edges = np.append(np.flatnonzero(cut), N)
        _, first = np.unique(sequence, return_index=True)
        new = np.zeros(N, np.bool_)
        new[first] = True
        self.fresh = np.logical_or.reduceat(new, self.edges[:-1])
        self.decode = np.ones(len(self), np.bool_)
        if self.by != "tokens":
            self.decode = ~np.logical_or.reduceat(prompt, self.edges[:-1])
        self.geometry = Geometry.of_trace(trace.meta)
        self.experts = [trace.experts(layer)[self.rows].astype(np.int64) for layer in trace.layers]
        self.weights = [trace.weights(layer)[self.rows].astype(np.float32) for layer in trace.layers]
        if not all(np.isfinite(weights).all() for weights in self.weights):
            raise TraceError(f"{trace.folder}: a combine weight is not finite")
        self._probabilities = self._read_probabilities(trace) if probabilities and trace.meta.has("logits") else None
        self._sorted = [self._sort(layer) for layer in range(len(self.experts))]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def arranged(self, groups: Sequence[Sequence[int]]) -> Passes:
        """Passes that each hold all rows of some of these; every pass of these is in one group."""
        found = copy.copy(self)
        order = [number for group in groups for number in group]
        starts, lengths = self.edges[:-1][order], np.diff(self.edges)[order]
        rows = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        firsts = np.cumsum([0, *map(len, groups)])
        found.by = "batches"
        found.edges = np.append(0, np.cumsum(lengths))[firsts]
        found.fresh = np.logical_or.reduceat(self.fresh[order], firsts[:-1])
        found.decode = np.logical_and.reduceat(self.decode[order], firsts[:-1])
        found.rows, found.tokens = self.rows[rows], self.tokens[rows]
        found.experts = [experts[rows] for experts in self.experts]
        found.weights = [weights[rows] for weights in self.weights]
        if self._probabilities is not None:
            found._probabilities = [values[rows] for values in self._probabilities]
        found._sorted = [found._sort(layer) for layer in range(len(found.experts))]
        return found

    def _sort(self, layer: int) -> tuple[Array, Array, Array, Array]:
        """Of rows as passes of their own: ids ascending, their weights, how many, and the order by weight."""
        experts, weights = self.experts[layer], self.weights[layer]
        E = self.geometry.experts[layer]
        by_id = np.argsort(experts, axis=1, kind="stable")
        ids, mass = np.take_along_axis(experts, by_id, 1), np.take_along_axis(weights, by_id, 1)
        used = (ids < E).sum(1)
        order = np.argsort(np.where(ids < E, -mass, np.inf), axis=1, kind="stable")
        return ids, mass, used, order

    def step(self, number: int, layer: int) -> Step:
        """What a layer of a pass asks for."""
        first, last = int(self.edges[number]), int(self.edges[number + 1])
        if last - first > 1:
            rows = slice(first, last)
            return Step.of(self.experts[layer][rows], self.weights[layer][rows], self.geometry.experts[layer])
        ids, mass, used, order = self._sorted[layer]
        n = int(used[first])
        return Step(ids[first, :n], mass[first, :n], np.ones(n, np.int64), order[first, :n])

    def probabilities(self, number: int, layer: int) -> Array | None:
        """``[E]`` mean over the pass's tokens of the router's probabilities; None where they were not kept."""
        if self._probabilities is None:
            return None
        found: Array = self._probabilities[layer][self.edges[number] : self.edges[number + 1]].astype(np.float32)
        return found.mean(0)

    def _read_probabilities(self, trace: Trace) -> list[Array]:
        found = []
        for layer in trace.layers:
            parts = [part.logits(layer) for part in trace.iter_parts([f"logits_{layer}"])]
            logits = np.concatenate(parts)[self.rows].astype(np.float32)
            if trace.meta.layer(layer).score == "sigmoid":
                values = 1 / (1 + np.exp(np.minimum(-logits, 80)))
            else:
                values = np.exp(np.maximum(logits - logits.max(1, keepdims=True), -80))
            found.append((values / values.sum(1, keepdims=True)).astype(np.float16))
        return found

    def stream(self, layers: Sequence[int] | None = None) -> Stream:
        """Every request, step by step, each step's in the order to ask for them; of some layers only, if asked."""
        keys, lengths = [], []
        for number in range(len(self)):
            for layer in range(self.geometry.num_layers) if layers is None else layers:
                step = self.step(number, layer)
                if len(step.experts):
                    keys.append(step.experts[step.order] + self.geometry.offsets[layer])
                    lengths.append(len(step.experts))
        return Stream(
            np.concatenate(keys) if keys else np.zeros(0, np.int64), np.concatenate([[0], np.cumsum(lengths)])
        )


def recorded_gate_inputs(trace: Trace) -> Callable[[int, Array], torch.Tensor]:
    """``(layer, rows) -> [T, d]`` of what routers saw, from a trace that recorded it for every token.

    Raises:
        TraceError: it was not recorded.
        ConfigError: it was recorded for a sample of the tokens only.
    """
    import torch

    inputs = []
    for layer in trace.layers:
        parts = [part.gate_inputs(layer) for part in trace.iter_parts([f"gate_input_{layer}"])]
        if sum(len(rows) for rows, _ in parts) != len(trace):
            raise ConfigError(
                f"{trace.folder} holds the routers' inputs of a sample of its tokens; record it with --gate-inputs 1"
            )
        inputs.append(torch.from_numpy(np.concatenate([values for _, values in parts])))

    def get(layer: int, rows: Array) -> torch.Tensor:
        return inputs[layer][torch.from_numpy(rows)]

    return get
