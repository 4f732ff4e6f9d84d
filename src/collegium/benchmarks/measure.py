"""What measuring a long trace costs: every metric that needs nothing but a trace. Goal: 100 million decisions in 60 s.

The traces are made up: 48 layers of 128 experts, 8 for each token, with favourites of domains and of token ids and
with slots that keep their expert for a while. A size is measured once, by a process of its own after one that has
compiled the kernels. The peer, and the physical limit, is reading the same experts from disk once; metrics read them
one after another, each for itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from collegium.benchmarks.harness import Row, Say
from collegium.jit import njit
from collegium.measure.metric import metrics
from collegium.process import peak_memory
from collegium.trace import LayerMeta, LayerRows, Trace, TraceMeta, TraceWriter
from collegium.trace.schema import column_names

__all__ = ["measure_all", "run", "synthesise"]

L, E, K = 48, 128, 8
SEQUENCE = 512
VOCABULARY = 8192
DOMAINS = ("code", "data", "prose", "web")
SIZES = (1_000_000, 10_000_000, 100_000_000)
"""Decisions: tokens x layers x K."""
SECONDS, BYTES = 60.0, 2e9
"""Goals at the largest size."""

Array = np.ndarray[Any, np.dtype[Any]]


def run(quick: bool, say: Say) -> Iterator[Row]:
    """All metrics together at every size, then each and the peak memory at the largest."""
    sizes = SIZES[:1] if quick else SIZES
    peer = "reading once"
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for decisions in sizes:
            say(f"bench measure: making up {decisions:,} decisions")
            folders.append(synthesise(Path(scratch) / str(decisions), decisions).folder)
        say("bench measure: compiling")
        _in_process(folders[0])
        for decisions, folder in zip(sizes, folders, strict=True):
            say(f"bench measure: {decisions:,} decisions")
            found = _in_process(folder)
            total = sum(found["metrics"].values())
            largest = decisions == SIZES[-1]
            name = f"{len(found['metrics'])} metrics, {decisions:,} decisions"
            limit = f"{total / decisions * 1e9:.0f} ns a decision"
            share = found["read"] / total
            yield Row(name, total, found["read"], peer, None, limit, share, SECONDS if largest else None)
    for name, seconds in found["metrics"].items():
        yield Row(name, seconds, found["read"], peer, share=found["read"] / seconds)
    yield Row("peak memory", found["bytes"], None, most=BYTES if largest else None, unit="bytes")


def measure_all(trace: Trace) -> dict[str, float]:
    """Seconds of every metric that needs nothing but a trace, in turn."""
    seconds = {}
    for metric in metrics():
        if metric.needs <= {"domains"}:
            start = time.perf_counter()
            metric.function(trace)
            seconds[metric.name] = time.perf_counter() - start
    return seconds


def _in_process(folder: Path) -> dict[str, Any]:
    """What `_child` finds in a fresh process."""
    program = "import sys; from collegium.benchmarks.measure import _child; _child(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _child(folder: str) -> None:
    """Print seconds of reading and of each metric, and the peak memory in bytes, as JSON."""
    metrics()  # imports everything
    trace = Trace.open(folder)
    for part in trace.iter_parts(["token"]):  # compares checksums, once
        len(part)
    read = min(_read(trace) for _ in range(2))
    seconds = measure_all(trace)
    sys.stdout.write(json.dumps({"read": read, "metrics": seconds, "bytes": peak_memory()}) + "\n")


def _read(trace: Trace) -> float:
    """Seconds of reading the experts of all layers once."""
    start = time.perf_counter()
    for part in trace.iter_parts([f"expert_{layer}" for layer in trace.layers]):
        for layer in trace.layers:
            part.experts(layer)
    return time.perf_counter() - start


def synthesise(folder: Path, decisions: int, *, seed: int = 0) -> Trace:
    """A made-up trace of about that many decisions, of whole documents of `SEQUENCE` tokens."""
    documents = max(1, round(decisions / (L * K * SEQUENCE)))
    meta = TraceMeta(
        model="made up",
        family="none",
        layers=tuple(
            LayerMeta(layer=layer, path=f"layers.{layer}.mlp", num_experts=E, top_k=K, score="softmax")
            for layer in range(L)
        ),
        data=f"{documents} documents made up with seed {seed}",
        domains=DOMAINS,
        columns=column_names(list(range(L)), logits=False, gate_inputs=False),
        created="2026-01-01T00:00:00+00:00",
        collegium="0",
    )
    random = np.random.default_rng(seed)
    # favourites: domains share a long tail and differ in their order; a token id has four experts of its own
    popularity = 1 / (np.arange(E) + 8.0)
    drawn_LCX = np.empty((L, len(DOMAINS), 1024), np.uint8)
    for row in drawn_LCX.reshape(-1, 1024):
        row[:] = random.choice(random.permutation(E), 1024, p=popularity / popularity.sum())
    own_LVX = random.integers(0, E, (L, VOCABULARY, 4), np.uint8)
    weight = np.sort(random.random((SEQUENCE, K)).astype(np.float16), axis=1)[:, ::-1].ravel()
    with TraceWriter(folder, meta) as writer:
        for document in range(documents):
            tokens = np.minimum(random.zipf(1.2, SEQUENCE), VOCABULARY) - 1
            domain = document % len(DOMAINS)
            experts = _route(tokens, drawn_LCX[:, domain], own_LVX, random)
            place = {"sequence": document, "document": document, "domain": domain}
            writer.add(
                {
                    "token": tokens,
                    "position": np.arange(SEQUENCE),
                    **{name: np.full(SEQUENCE, value) for name, value in place.items()},
                },
                [LayerRows(layer.ravel(), weight) for layer in experts],
                step=document,
            )
    return Trace.open(folder)


@njit(cache=True)
def _route(tokens: Array, drawn_LX: Array, own_LVX: Array, random: np.random.Generator) -> Array:
    """``[L, N, K]`` experts of a document: a slot keeps its expert, takes one of the token or one of the domain."""
    L, N = len(drawn_LX), len(tokens)
    experts = np.zeros((L, N, K), np.uint8)
    taken = np.full(E, -1)
    for layer in range(L):
        for t in range(N):
            now = layer * N + t
            for k in range(K):
                die = random.random()
                e = experts[layer, t - 1, k]
                if t == 0 or die > 0.5 or taken[e] == now:
                    e = own_LVX[layer, tokens[t], random.integers(0, 4)]
                    while die < 0.8 or taken[e] == now:
                        die = 1.0
                        e = drawn_LX[layer, random.integers(0, drawn_LX.shape[1])]
                taken[e] = now
                experts[layer, t, k] = e
    return experts
