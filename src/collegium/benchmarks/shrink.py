"""What pruning a checkpoint on disk costs: half of the experts of OLMoE-1B-7B, against copying as many bytes.

The checkpoint is made up: the tensors, names and sizes of that model in bfloat16, 13.8 GB, with random contents. Every
second expert goes, so no two that stay are neighbours. Both sides write as many bytes to the same disk and wait until
they are there, and both start with none of the source in memory. The physical limit is the copy.
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
from transformers import OlmoeConfig

from collegium import __version__
from collegium.benchmarks.harness import Row, Say, peak_memory
from collegium.compress.plan import Asked, LayerPlan, Plan
from collegium.compress.rewrite_files import SHARD_BYTES
from collegium.compress.target import Target
from collegium.models.checkpoint import open_checkpoint

__all__ = ["halve", "run", "synthesise"]

LAYERS, QUICK_LAYERS = 16, 2
TURNS = 3
GOAL, BYTES = 0.7, 1.5e9
"""Share of the speed of a copy, and peak resident memory."""
_STEP = 1 << 20  # bytes; a copy in larger steps is slower


def run(quick: bool, say: Say) -> Iterator[Row]:
    """Time and peak memory of pruning to half of the experts."""
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
            found = _in_process(Path(scratch) / "plan.json", source, out)
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


def _in_process(plan: Path, source: Path, out: Path) -> dict[str, float]:
    """What `_child` finds in a fresh process."""
    program = "import sys; from collegium.benchmarks.shrink import _child; _child(*sys.argv[1:])"
    command = [sys.executable, "-c", program, str(plan), str(source), str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _child(plan: str, source: str, out: str) -> None:
    """Print the seconds that applying takes, until all is on disk, and the peak memory in bytes, as JSON."""
    from collegium.compress.rewrite import apply_plan

    opened = Plan.load(plan)
    start = time.perf_counter()
    apply_plan(opened, source, out)
    seconds = time.perf_counter() - start
    sys.stdout.write(json.dumps({"seconds": seconds, "bytes": peak_memory()}) + "\n")


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
