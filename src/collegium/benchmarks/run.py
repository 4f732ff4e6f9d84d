"""More model than memory: decode and prefill against llama.cpp, everything in memory and under a memory cgroup.

The model is made up: OLMoE's shape (d 2048, f 1024, 64 experts of which 8), 16 layers, experts in 8 or 4 bits with
the same codes and scales on both sides, other matrices in 8 bits alike. Its routing follows a table by token id, so
both sides see the same: experts at random (the worst case), or those that the demo model chose in a real text, scaled
to the shape. Both sides are fed the same tokens: a prompt of 512, some tokens that are not timed, then the timed ones.

* In memory, 8 and 4 bits. The limit is the time to read from memory what one token needs, or to do the matrix products
  of a prompt. transformers in bfloat16 is a second peer where it fits.
* In 50 % and 28 % of the size of llama.cpp's file, 8 bits: page cache counted, files not in the page cache before. The
  limit is the slower of two: reading what we read from the disk, at the rate of direct reads of experts at random, and
  the limit in memory. We read on demand only: a predictor would find the table.
* Seconds of a token under these limits as the simulator predicts them from where the tokens were sent and from times of
  the tokens before, beside those of the engine.
* Hit rates of all cache policies on traces of the demo model, with room for two times the experts of one token, beside
  the optimum that knows the future. They are simulated; nothing is read ahead.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from collegium.benchmarks._run_capped import forget, run_capped, why_not
from collegium.benchmarks._run_files import make
from collegium.benchmarks._run_limits import decode_bytes, disk_rate, prompt_operations
from collegium.benchmarks._run_model import Shape
from collegium.benchmarks._run_policies import hit_rates
from collegium.benchmarks._run_routing import routing_table
from collegium.benchmarks._run_simulated import predicted
from collegium.benchmarks.harness import Row, Say, gemm_rate, memory_bandwidth
from collegium.errors import ConfigError
from collegium.offload.cost import CostModel

__all__ = ["run"]

SHAPE = Shape()
QUICK_LAYERS = 4
PROMPT, WARM, DECODE = 512, 16, 24
PROMPTS, TURNS = 3, 2
DECODE_GOAL, PROMPT_GOAL = 1.0, 1.5
"""In memory, as multiples of llama.cpp's speed."""
CAPPED_GOALS = {0.50: {"random": 2.2, "replayed": 3.0}, 0.28: {"random": 12.0, "replayed": 15.0}}
CAPPED_PROMPT_GOAL = 2.0
CONTEXT = 1024
TOKENS, QUICK_TOKENS = 1024, 128
"""Of each text whose routing all policies are simulated on."""
_PEER = ("gguf", "llama_cpp")  # packages
_WORDS = {"random": "random routing", "replayed": "replayed routing"}


@dataclass(frozen=True)
class _Files:
    """The two sides' files of one shape, and what the machine can do with them."""

    shape: Shape
    store: Path
    gguf: Path
    bandwidth: float
    gemm: float

    def forget(self) -> None:
        forget(self.store, self.gguf)


def run(quick: bool, say: Say) -> Iterator[Row]:
    """Seconds of a token and of a prompt, in memory and under limits, the memory that was held, and hit rates.

    Raises:
        ConfigError: llama.cpp or the writer of its files is not installed.
    """
    for package in _PEER:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"this benchmark needs {package}; install collegium[bench]")
    logging.disable_progress_bar()  # the lines of `say` tell what goes on
    shape = replace(SHAPE, layers=min(SHAPE.layers, QUICK_LAYERS)) if quick else SHAPE
    bandwidth, gemm = memory_bandwidth(), gemm_rate(torch.float32)
    for bits in (8, 4):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            files = _Files(replace(shape, bits=bits), folder / "store", folder / "model.gguf", bandwidth, gemm)
            say(f"bench run: making up a model of {shape.layers} layers in {bits} bits")
            make(files.shape, routing_table(files.shape, PROMPT + WARM + DECODE), files.store, files.gguf)
            yield from _in_memory(files, 1 if quick else TURNS, say)
            if bits == 8 and not quick:
                for share in CAPPED_GOALS:
                    yield from _capped(files, share, say)
    say("bench run: hit rates of all policies")
    yield from hit_rates(QUICK_TOKENS if quick else TOKENS)


# ---- everything in memory --------------------------------------------------------------------------------------------


def _in_memory(files: _Files, turns: int, say: Say) -> Iterator[Row]:
    bits, shape = files.shape.bits, files.shape
    plan = _plan(("random",))
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "llama.cpp": []}
    for turn in range(turns):
        for side, results in found.items():
            say(f"bench run: {bits} bits in memory, {side}, turn {turn + 1} of {turns}")
            results.append(_process(side, files, plan)["random"])
    say(f"bench run: {bits} bits, same next token {_agreement(found['ours'][0], found['llama.cpp'][0]):.0%}")
    ours, peer = ({kind: _median(results, kind) for kind in ("decode", "prompt")} for results in found.values())
    limits = {"decode": decode_bytes(shape) / files.bandwidth, "prompt": prompt_operations(shape, PROMPT) / files.gemm}
    words = {
        "decode": f"memory {files.bandwidth / 1e9:,.0f} GB/s",
        "prompt": f"matrix products {files.gemm / 1e9:,.0f} GFLOP/s",
    }
    for kind, goal in (("decode", DECODE_GOAL), ("prompt", PROMPT_GOAL)):
        share = limits[kind] / ours[kind]
        yield Row(_name(kind, f"{bits} bits in memory"), ours[kind], peer[kind], "llama.cpp", goal, words[kind], share)
    if bits == 8 and _fits(shape):
        say("bench run: transformers in bfloat16")
        second = _process("transformers", files, plan)["random"]
        for kind in ("decode", "prompt"):
            name = _name(kind, "8 bits, transformers' bfloat16")
            yield Row(name, ours[kind], _median([second], kind), "transformers")


def _fits(shape: Shape) -> bool:
    """Whether the model in bfloat16 is surely less than the free memory."""
    needed = 2 * (shape.layers * (3 * shape.E * shape.f + 4 * shape.d) + 2 * shape.vocabulary) * shape.d + (2 << 30)
    info = Path("/proc/meminfo")
    if not info.exists():
        return False
    free = next(int(line.split()[1]) for line in info.read_text().splitlines() if line.startswith("MemAvailable:"))
    return needed < 1024 * free


# ---- under a limit ---------------------------------------------------------------------------------------------------


def _capped(files: _Files, share: float, say: Say) -> Iterator[Row]:
    limit = _limit(share, files)
    within = f"8 bits in {share:.0%}"
    reason = why_not()
    if reason is not None:
        yield Row(within, math.nan, None, limit=f"not measured: {reason}")
        return
    plan, found, peaks = _plan(tuple(_WORDS)), {}, {}
    rate = disk_rate(files.store, files.shape)
    recording = files.store.with_name("recording.npz")
    disk = CostModel(read_bandwidth=rate, read_latency=0, memory_bandwidth=files.bandwidth, measured="bench run")
    plan["record"] = {"file": str(recording), "cost": disk.model_dump(mode="json")}
    for side in ("ours", "llama.cpp"):
        say(f"bench run: 8 bits in {limit / 1e9:.2f} GB, {side}")
        files.forget()
        found[side], peaks[side] = _process_capped(side, files, plan, limit)
    files.forget()
    for routing, goal in CAPPED_GOALS[share].items():
        yield _bounded(files, "decode", f"{within}, {_WORDS[routing]}", [routing], found, rate, goal)
    yield _bounded(files, "prompt", within, list(_WORDS), found, rate, CAPPED_PROMPT_GOAL)
    say(f"bench run: {within}, simulated")
    yield from predicted(recording, found["ours"], {name: f"{within}, {word}" for name, word in _WORDS.items()})
    size = files.gguf.stat().st_size
    words = f"{share:.0%} of {size / 1e9:.2f} GB"
    yield Row(
        f"peak memory, {within}", peaks["ours"], peaks["llama.cpp"], "llama.cpp", limit=words, most=limit, unit="bytes"
    )


def _limit(share: float, files: _Files) -> int:
    """Bytes: of llama.cpp's file, the larger one."""
    return int(share * files.gguf.stat().st_size)


def _bounded(
    files: _Files, kind: str, words: str, routings: Sequence[str], found: dict[str, Any], rate: float, goal: float
) -> Row:
    """A row whose limit is the disk, or the memory or arithmetic where that is slower."""
    sides = {side: [results[routing] for routing in routings] for side, results in found.items()}
    ours, peer = (_median(results, kind) for results in sides.values())
    read = statistics.mean(result[f"{kind}_read"] for result in sides["ours"])
    computing = (
        decode_bytes(files.shape) / files.bandwidth
        if kind == "decode"
        else prompt_operations(files.shape, PROMPT) / files.gemm
    )
    bound = max(read / rate, computing)
    limit = f"{read / 1e6:,.0f} MB from disk at {rate / 1e9:.2f} GB/s {read / rate:.2f} s; computing {computing:.2f} s"
    return Row(_name(kind, words), ours, peer, "llama.cpp", goal, limit, bound / ours)


# ---- processes -------------------------------------------------------------------------------------------------------


def _plan(routings: tuple[str, ...]) -> dict[str, Any]:
    """What a side is to do. Token ids below the length of a text are routed as in it, the next ones at random."""
    runs = []
    length = PROMPT + WARM + DECODE
    for routing in routings:
        first = 0 if routing == "replayed" else length
        ids = list(range(first, first + length))
        warm = PROMPT + WARM
        run = {"name": routing, "prompt": ids[:PROMPT], "warm": ids[PROMPT:warm], "decode": ids[warm:]}
        runs.append({**run, "prompts": PROMPTS})
    return {"context": CONTEXT, "runs": runs}


def _command(side: str, files: _Files, plan: dict[str, Any], memory: int | None) -> list[str]:
    path = files.gguf if side == "llama.cpp" else files.store
    file = files.gguf.with_name("plan.json")
    file.write_text(json.dumps({**plan, "path": str(path), "memory": memory}))
    program = "import sys; from collegium.benchmarks._run_sides import main; main(*sys.argv[1:])"
    return [sys.executable, "-c", program, side, str(file)]


def _process(side: str, files: _Files, plan: dict[str, Any]) -> dict[str, Any]:
    """What `drive` finds in a fresh process."""
    done = subprocess.run(_command(side, files, plan, None), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _process_capped(side: str, files: _Files, plan: dict[str, Any], limit: int) -> tuple[dict[str, Any], int]:
    """The same within so many bytes, and the peak."""
    done = run_capped(_command(side, files, plan, limit), limit)
    return json.loads(done.output.splitlines()[-1]), done.peak


def _median(results: Sequence[dict[str, Any]], kind: str) -> float:
    return statistics.median(seconds for result in results for seconds in result[kind])


def _agreement(ours: dict[str, Any], peer: dict[str, Any]) -> float:
    """In how many of the timed tokens both sides' best next token is one."""
    return statistics.mean(a == b for a, b in zip(ours["best"], peer["best"], strict=True))


def _name(kind: str, words: str) -> str:
    return f"{'decode' if kind == 'decode' else f'prefill {PROMPT}'}, {words}"
