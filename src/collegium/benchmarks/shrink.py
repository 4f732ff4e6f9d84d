"""What shrinking a checkpoint on disk costs: pruning half of the experts of OLMoE-1B-7B, and calibrating it before.

The checkpoint is made up: the tensors, names and sizes of that model in bfloat16, 13.8 GB, with random contents.

* Pruning, against copying as many bytes: every second expert goes, so no two that stay are neighbours. Both sides write
  as many bytes to the same disk and wait until they are there, and both start with none of the source in memory. The
  physical limit is the copy.
* Calibrating on 8,192 random tokens of four domains, 8 sequences of 512 a batch, with the default collectors. The
  physical limit is the slower of two: the matrix products of one forward through the decoder layers at this machine's
  float32 rate, and reading the checkpoint once from the disk.
* What the default statistics of a model with 128 experts in each of 48 layers (Qwen3-30B-A3B) take on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import OlmoeConfig

from collegium import __version__
from collegium.benchmarks.harness import Row, Say, gemm_rate
from collegium.compress.collectors import DEFAULTS
from collegium.compress.plan import Asked, LayerPlan, Plan
from collegium.compress.target import Target
from collegium.measure.statistics import LayerEntry, Statistics, StatisticsMeta
from collegium.models.checkpoint import open_checkpoint
from collegium.models.shards import SHARD_BYTES
from collegium.process import peak_memory
from collegium.rng import generator

__all__ = ["empty_statistics", "halve", "run", "synthesise"]

LAYERS, QUICK_LAYERS = 16, 2
TURNS = 3
GOAL, BYTES = 0.7, 1.5e9
"""Pruning: share of the speed of a copy, and peak resident memory."""
CALIBRATION_BYTES, STATISTICS_BYTES = 4e9, 5e8
"""Calibrating: peak resident memory, and what the statistics of the large model take on disk."""
TOKENS, SEQUENCES, LENGTH = 8192, 8, 512
"""Of a calibration: in all, and of a batch."""
DOMAINS = ("a", "b", "c", "d")
_STEP = 1 << 20  # bytes; a copy in larger steps is slower


def run(quick: bool, say: Say) -> Iterator[Row]:
    """Time and peak memory of pruning to half of the experts and of calibrating, and the size of statistics."""
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "source", Path(scratch) / "out"
        say("bench shrink: making up a checkpoint")
        synthesise(source, QUICK_LAYERS if quick else LAYERS)
        plan = halve(source)
        plan.save(Path(scratch) / "plan.json")
        whole = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        ours: list[float] = []
        peer: list[float] = []
        peak, nbytes = 0.0, 0
        for turn in range(TURNS):
            say(f"bench shrink: {whole / 1e9:.1f} GB, turn {turn + 1} of {TURNS}")
            _settle(source)
            found = _in_process("prune", Path(scratch) / "plan.json", source, out)
            ours.append(found["seconds"])
            peak = max(peak, found["bytes"])
            nbytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            shutil.rmtree(out)
            _settle(source)
            peer.append(_copy(source, out, nbytes))
            shutil.rmtree(out)
        seconds, copied = statistics.median(ours), statistics.median(peer)
        limit = f"copy {nbytes / copied / 1e6:,.0f} MB/s"
        name = f"prune {whole / 1e9:.1f} GB to half of the experts"
        yield Row(name, seconds, copied, "copying as many bytes", GOAL, limit, copied / seconds)
        yield Row("peak memory", peak, None, most=BYTES, unit="bytes")
        say(f"bench shrink: {whole / 1e9:.1f} GB, calibrating")
        yield from _calibration(source, Path(scratch) / "statistics", whole)
        yield _size(Path(scratch) / "empty")


def _calibration(source: Path, out: Path, whole: int) -> Iterator[Row]:
    """Time and peak memory of calibrating `source`, whose shards are `whole` bytes."""
    config = json.loads((source / "config.json").read_text())
    _settle(source)
    found = _in_process("calibrate", source, out)
    _settle(source)
    reading, rate = _read(source), gemm_rate(torch.float32)
    computing = TOKENS * _operations(config) / rate
    limit = f"matrix products at {rate / 1e9:,.0f} GFLOP/s {computing:,.1f} s; reading {reading:,.1f} s"
    seconds = found["seconds"]
    name = f"calibrate {whole / 1e9:.1f} GB on {TOKENS:,} tokens"
    yield Row(name, seconds, None, limit=limit, share=max(computing, reading) / seconds)
    yield Row("peak memory of calibrating", found["bytes"], None, most=CALIBRATION_BYTES, unit="bytes")


def _operations(config: dict[str, int]) -> float:
    """Floating-point operations of the matrix products of one token in the decoder layers: projections, attention over
    half a sequence on average, and the experts it is routed to."""
    d, f, K = (config[name] for name in ("hidden_size", "intermediate_size", "num_experts_per_tok"))
    return 2 * config["num_hidden_layers"] * (4 * d * d + LENGTH * d + 3 * K * d * f)


def _size(folder: Path) -> Row:
    """What the default statistics of Qwen3-30B-A3B take on disk."""
    empty_statistics(48, E=128, d=2048, f=768).save(folder)
    nbytes = sum(file.stat().st_size for file in folder.iterdir())
    return Row("statistics, 128 experts x 48 layers", nbytes, None, most=STATISTICS_BYTES, unit="bytes")


def empty_statistics(layers: int, *, E: int, d: int, f: int, top_k: int = 8) -> Statistics:
    """Statistics of the default collectors in which everything is 0."""
    entries = tuple(entry for one in DEFAULTS for entry in one.statistics)
    sizes = {"num_experts": E, "top_k": top_k, "hidden_size": d, "intermediate_size": f}
    meta = StatisticsMeta(
        model="made up",
        family="none",
        num_layers=layers,
        layers=tuple(LayerEntry(layer=number, path=f"layers.{number}", **sizes) for number in range(layers)),
        data=("none",),
        domains=DOMAINS,
        tokens=0,
        statistics=entries,
        collectors={one.name: {} for one in DEFAULTS},
        created="2026-01-01T00:00:00+00:00",
        collegium=__version__,
    )
    tensors = {
        (layer.layer, entry.name): torch.zeros(entry.shape(layer, len(DOMAINS)), dtype=getattr(torch, entry.dtype))
        for layer in meta.layers
        for entry in entries
    }
    return Statistics(meta, tensors)


def synthesise(
    folder: Path, layers: int, *, E: int = 64, d: int = 2048, f: int = 1024, vocabulary: int = 50304
) -> None:
    """A checkpoint of OLMoE's architecture in bfloat16, with random contents; the sizes default to OLMoE-1B-7B's."""
    folder.mkdir()
    config = OlmoeConfig(
        hidden_size=d,
        intermediate_size=f,
        num_experts=E,
        num_experts_per_tok=min(8, E // 2),
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        eos_token_id=0,
    )
    config.architectures, config.dtype = ["OlmoeForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d)}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
        norms = ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm")
        shapes |= {f"{stem}.{name}.weight": (d,) for name in norms}
        shapes[f"{stem}.mlp.gate.weight"] = (E, d)
        for e in range(E):
            expert = f"{stem}.mlp.experts.{e}"
            shapes |= {f"{expert}.{name}_proj.weight": (f, d) for name in ("gate", "up")}
            shapes[f"{expert}.down_proj.weight"] = (d, f)
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (vocabulary, d)}
    _write(folder, shapes)


def _write(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Shards of random bytes that are finite bfloat16 numbers."""
    random = np.random.default_rng(0)
    noise = (random.standard_normal(1 << 23).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if size + nbytes > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += nbytes
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(group, file)
        entries: dict[str, object] = {}
        end = 0
        for name, shape in group.items():
            first, end = end, end + 2 * int(np.prod(shape))
            entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [first, end]}
        header = json.dumps(entries).encode()
        with open(folder / file, "wb") as handle:
            handle.write(len(header).to_bytes(8, "little") + header)
            for first in range(0, end, len(noise)):
                handle.write(noise[: end - first])
            handle.flush()
            os.fsync(handle.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def halve(folder: Path) -> Plan:
    """The plan that keeps every second expert of a checkpoint."""
    target = Target.of(open_checkpoint(folder))
    return Plan(
        model=target.model,
        fingerprint=target.fingerprint,
        family=target.family,
        method="every second",
        planner="none",
        asked=Asked(what="keep", value=0.5),
        top_k=target.top_k,
        groups=target.groups,
        top_groups=target.top_groups,
        nbytes=target.nbytes,
        parameters=target.parameters,
        layers=tuple(
            LayerPlan(
                layer=one.layer,
                op="prune",
                num_experts=one.num_experts,
                keep=tuple(range(0, one.num_experts, 2)),
                expert_nbytes=one.expert_nbytes,
                expert_parameters=one.expert_parameters,
            )
            for one in target.layers
        ),
        created="2026-01-01T00:00:00+00:00",
        collegium=__version__,
    )


def _in_process(function: str, *paths: Path) -> dict[str, float]:
    """The seconds that "prune" or "calibrate" takes in a fresh process, and the peak memory of that in bytes."""
    program = "import sys; from collegium.benchmarks import shrink; shrink._child(*sys.argv[1:])"
    command = [sys.executable, "-c", program, function, *map(str, paths)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _child(function: str, *paths: str) -> None:
    """Print what `_in_process` is to read."""
    seconds = _prune(*paths) if function == "prune" else _calibrate(*paths)
    sys.stdout.write(json.dumps({"seconds": seconds, "bytes": peak_memory()}) + "\n")


def _prune(plan: str, source: str, out: str) -> float:
    """Seconds that applying takes, until all is on disk."""
    from collegium.compress.rewrite import apply_plan

    opened = Plan.load(plan)
    start = time.perf_counter()
    apply_plan(opened, source, out)
    return time.perf_counter() - start


def _calibrate(source: str, out: str) -> float:
    """Seconds that a calibration with the default collectors takes."""
    from collegium.compress.stream import calibrate

    vocabulary = json.loads((Path(source) / "config.json").read_text())["vocab_size"]
    ids = torch.randint(vocabulary, (TOKENS // LENGTH, LENGTH), generator=generator("bench shrink"))
    batches = [{"input_ids": rows, "domain": torch.arange(len(rows)) % len(DOMAINS)} for rows in ids.split(SEQUENCES)]
    start = time.perf_counter()
    calibrate(source, batches, [one() for one in DEFAULTS], out, domains=DOMAINS)
    return time.perf_counter() - start


def _read(folder: Path) -> float:
    """Seconds of reading the shards."""
    buffer = memoryview(bytearray(_STEP))
    start = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as reader:
            while reader.readinto(buffer):
                pass
    return time.perf_counter() - start


def _copy(source: Path, out: Path, nbytes: int) -> float:
    """Seconds of copying the first `nbytes` of the shards, until they are on disk."""
    out.mkdir()
    buffer = memoryview(bytearray(_STEP))
    start = time.perf_counter()
    for file in sorted(source.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as reader, open(out / file.name, "wb", buffering=0) as writer:
            while nbytes and (done := reader.readinto(buffer[: min(nbytes, len(buffer))])):
                writer.write(buffer[:done])
                nbytes -= done
            os.fsync(writer.fileno())
    return time.perf_counter() - start


def _settle(folder: Path) -> None:
    """Let earlier writes end, and the page cache forget the shards, so that both sides read them from the disk."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as handle:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
