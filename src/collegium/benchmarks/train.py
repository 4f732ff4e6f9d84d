"""Training the demo model with ``collegium train`` against the same model with transformers' Trainer.

Both begin from the same weights (exported to transformers' Qwen3Moe) and take the same batches in the same order, with
the same AdamW, schedule, clipping, balance loss and number of threads, in float32. The peer runs the fastest of
transformers' implementations of experts. Its optimizer, schedule and sequences are given to it, the rest is Trainer's.
Each side is a process of its own, and they take turns, a few steps each.

* Seconds of a step. The limit is its matrix products at this machine's float32 rate.
* The text's loss, the mean over the last steps; that of the first step must be the same. Our balance loss is a mean
  over layers and the peer's is taken over the tokens of all layers together, so the two do not stay equal.
* Peak memory.

Neither side masks documents: the peer's balance loss takes no mask of a packed sequence. That, the amount of text and
the number of steps are what differs from ``recipes/demo.yaml``.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from collegium.benchmarks.harness import Row, Say, gemm_rate
from collegium.data import open_corpus
from collegium.errors import ConfigError
from collegium.models import export
from collegium.train.build import build_model
from collegium.train.prepare import prepare
from collegium.train.ranks import Ranks
from collegium.train.recipe import Recipe

__all__ = ["RECIPE", "flops_of_step", "run"]

RECIPE: dict[str, Any] = {
    "model": {
        "family": "qwen3", "hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    },
    "moe": {
        "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "balance": {"load_balancing": 0.01, "scope": "global"},
    },
    "data": {"corpus": "local", "vocab_size": 4096, "sequence_length": 256},
    "optim": {"lr": 2e-3},
    "schedule": {"name": "wsd", "warmup": 0.02, "decay": 0.2, "final": 0.0},
    "run": {"batch_size": 32},
}  # fmt: skip
"""What ``recipes/demo.yaml`` says of the model and of a step."""
BYTES_PER_DOMAIN = 500_000
"""Of text; a run reads a part of it once."""
PIECES, STEPS = 18, 5
QUICK_PIECES, QUICK_STEPS = 4, 2
"""Turns of a side, the first of which is not timed, and steps of a turn."""
LAST = 20
"""Steps whose losses are compared."""
GOAL = 1.3
SAME, ALIKE = 1e-4, 0.015
"""How far the first loss, and the mean of the last, may be from the peer's, as a share of it."""
IMPLEMENTATIONS = ("grouped_mm", "eager")
"""Of experts in transformers; `batched_mm` copies the weights of every slot."""


def run(quick: bool, say: Say) -> Iterator[Row]:
    """A step's time, the losses, and what each side held.

    Raises:
        ConfigError: accelerate, which Trainer needs, is not installed.
        RuntimeError: a side failed, or the sides do not begin alike.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("this benchmark needs accelerate; install collegium[bench]")
    pieces, steps = (QUICK_PIECES, QUICK_STEPS) if quick else (PIECES, STEPS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        say("bench train: text, tokenizer and model")
        recipe = _recipe(folder, pieces * steps + 1)
        _make(recipe, folder)
        experts = _fastest(folder, 1 if quick else 2, say)
        found = _race(folder, experts, pieces, steps, say)
        yield from _rows(recipe, found, experts)


def _recipe(folder: Path, steps: int) -> Recipe:
    data = {"mask_documents": False, "corpus": str(folder / "text.jsonl"), "cache": folder / "cache"}
    settings = {f"data.{name}": value for name, value in data.items()}
    return Recipe.parse(RECIPE, {**settings, "run.steps": steps})


def _make(recipe: Recipe, folder: Path) -> None:
    """Write the text, the recipe, the packed sequences of both sides, and the model as the peer reads it."""
    corpus = open_corpus("local", max_bytes_per_domain=BYTES_PER_DOMAIN)
    with open(recipe.data.corpus, "w", encoding="utf-8") as text:
        for document in corpus.documents():
            text.write(json.dumps({"text": document.text, "domain": document.domain}) + "\n")
    (folder / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    tokenizer = prepare(recipe, Ranks()).tokenizer
    logging.disable_progress_bar()  # the lines of `say` tell what goes on
    export(build_model(recipe, tokenizer), "qwen3_moe").save_pretrained(folder / "peer")


# ---- turns -----------------------------------------------------------------------------------------------------------


class _Side:
    """A process that runs one side and waits before each piece of steps.

    Raises:
        RuntimeError: it ended of itself; the message ends with what it said last.
    """

    def __init__(self, folder: Path, steps: int, name: str, experts: str = "") -> None:
        program = "import sys; from collegium.benchmarks import _train_sides; _train_sides.main(*sys.argv[1:3], "
        program += "sys.argv[3], int(sys.argv[4]), sys.argv[5])"
        arguments = [name, str(folder / "recipe.yaml"), str(folder), str(steps), experts]
        self.name, self._errors = name, folder / f"{name}.txt"
        with open(self._errors, "w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._read()

    def piece(self) -> None:
        """Run the next piece of steps."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        found = self._read()
        self.seconds.append(found["seconds"])
        self.losses += found["losses"]

    def end(self) -> int:
        """Bytes that it held at most."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        nbytes = int(self._read()["bytes"])
        self._process.wait()
        return nbytes

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = self._errors.read_text()[-2000:]
            raise RuntimeError(f"the side {self.name!r} ended with status {self._process.wait()}: {last}")
        found: dict[str, Any] = json.loads(line)
        return found


@dataclass(frozen=True)
class _Found:
    """Median seconds of a step, the loss of each, and bytes held at most."""

    seconds: float
    losses: list[float]
    nbytes: int


def _fastest(folder: Path, pieces: int, say: Say) -> str:
    """The peer's implementation of experts that takes the least time for a step."""
    seconds = {}
    for experts in IMPLEMENTATIONS:
        say(f"bench train: transformers, experts by {experts}")
        side = _Side(folder, 1, "transformers", experts)
        for _ in range(pieces + 1):
            side.piece()
        side.end()
        seconds[experts] = min(side.seconds[1:])
    return min(seconds, key=lambda experts: seconds[experts])


def _race(folder: Path, experts: str, pieces: int, steps: int, say: Say) -> dict[str, _Found]:
    """Both sides, a piece of steps each in turn."""
    sides = [_Side(folder, steps, "ours"), _Side(folder, steps, "transformers", experts)]
    for turn in range(pieces):
        for side in sides:
            say(f"bench train: {side.name}, turn {turn + 1} of {pieces}")
            side.piece()
    return {side.name: _Found(statistics.median(side.seconds[1:]) / steps, side.losses, side.end()) for side in sides}


# ---- rows ------------------------------------------------------------------------------------------------------------


def _rows(recipe: Recipe, found: dict[str, _Found], experts: str) -> Iterator[Row]:
    ours, peer = found["ours"], found["transformers"]
    if abs(ours.losses[0] / peer.losses[0] - 1) > SAME:
        raise RuntimeError(
            f"the loss of the first step is {ours.losses[0]} and {peer.losses[0]}: the sides do not run the same model "
            "on the same batch"
        )
    name, tokens = f"Trainer, {experts}", recipe.run.batch_size * recipe.data.sequence_length
    rate = gemm_rate(torch.float32)
    least = flops_of_step(recipe) / rate
    limit = f"{tokens / ours.seconds:,.0f} tokens/s; matrix products at {rate / 1e9:,.0f} GFLOP/s {least:.2f} s"
    yield Row(f"a step of {tokens:,} tokens", ours.seconds, peer.seconds, name, GOAL, limit, least / ours.seconds)
    a, b = (statistics.mean(side.losses[-LAST:]) for side in (ours, peer))
    limit = f"{a:.4f} and {b:.4f} nats per token; the first step {ours.losses[0]:.4f} and {peer.losses[0]:.4f}"
    last = f"loss of the last {min(LAST, len(ours.losses))} of {len(ours.losses)} steps, as a share of the peer's"
    yield Row(last, a / b, 1.0, name, limit=limit, unit="share", within=ALIKE)
    yield Row("peak memory", ours.nbytes, peer.nbytes, name, unit="bytes")


def flops_of_step(recipe: Recipe) -> float:
    """Floating-point operations of the matrix products of a step: three times those of the forward pass, in which a
    token attends to half of its sequence on average."""
    model, moe = recipe.model, recipe.moe
    assert moe is not None and model.hidden_size and model.num_hidden_layers  # noqa: PT018
    assert model.num_attention_heads and model.num_key_value_heads and model.head_dim  # noqa: PT018
    d, S, heads = model.hidden_size, recipe.data.sequence_length, model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    experts = d * (moe.num_experts + 3 * moe.num_experts_per_tok * moe.moe_intermediate_size)
    layer = 2 * d * (heads + keys) + heads * S + experts
    return 6.0 * recipe.run.batch_size * S * (model.num_hidden_layers * layer + d * recipe.data.vocab_size)
