"""What the machine allows the `run` benchmark: experts a second from its disk, and what must be computed."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from collegium.benchmarks._run_model import Shape
from collegium.offload.store.direct import DirectFile
from collegium.offload.store.source import aligned

__all__ = ["decode_bytes", "disk_rate", "prompt_operations"]

READERS = 3  # as many as the engine has unless it is told otherwise


def disk_rate(store: Path, shape: Shape, seconds: float = 3.0) -> float:
    """Bytes per second of direct reads of whole experts at random, by several threads at once.

    Args:
        seconds: for how long it is measured.
    """
    files = [DirectFile(path) for path in sorted(store.glob("experts-*.bin"))]
    nbytes = shape.layout.nbytes
    start = time.perf_counter()

    def read(seed: int) -> int:
        draw, record, done = random.Random(seed), aligned(nbytes), 0
        while time.perf_counter() - start < seconds:
            done += draw.choice(files).read(record, draw.randrange(shape.E) * nbytes)
        return done

    with ThreadPoolExecutor(READERS) as pool:
        done = sum(pool.map(read, range(READERS)))
    taken = time.perf_counter() - start
    for file in files:
        file.close()
    return done / taken


def decode_bytes(shape: Shape) -> int:
    """Bytes of weights that one token needs: its experts, attention, routers and head."""
    attention = 4 * shape.d**2 + 2 * shape.E * shape.d
    return shape.layers * (shape.K * shape.layout.nbytes + attention) + shape.vocabulary * shape.d


def prompt_operations(shape: Shape, tokens: int) -> int:
    """Floating-point operations of the matrix products of a prompt, whose attention spans half of it on average."""
    layer = 4 * shape.d**2 + tokens * shape.d + shape.E * shape.d + 3 * shape.K * shape.d * shape.f
    return 2 * (tokens * shape.layers * layer + shape.vocabulary * shape.d)
