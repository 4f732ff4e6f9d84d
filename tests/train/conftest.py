"""A corpus of two made-up languages and a recipe that trains on it in a second or two."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from collegium.train import Recipe


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over threads round differently for different numbers of threads; subprocesses get OMP_NUM_THREADS=1."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder corpus: domains "count" (numbers in order) and "song" (few words, shuffled)."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = ["sun", "moon", "river", "über", "stone", "wind", "fire", "東京", "rain"]
    for n in range(80):
        start = draw.randrange(1000)
        texts = {
            "count": " ".join(str(start + i) for i in range(60)),
            "song": " ".join(draw.choice(words) for _ in range(60)) + ".\n",
        }
        for domain, text in texts.items():
            place = folder / ("valid" if n % 8 == 0 else "train") / domain
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{n}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def settings(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """A function that gives the tiny recipe as plain data; keyword arguments are overrides, ``run__steps=3``."""
    cache = tmp_path_factory.mktemp("cache")

    def make(**overrides: Any) -> dict[str, Any]:
        data: dict[str, Any] = {
            "model": {
                "family": "qwen3",
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                # larger than usual, so that routing decisions are not near-ties
                "config": {"initializer_range": 0.2},
            },
            "moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            "data": {"corpus": str(corpus), "vocab_size": 300, "sequence_length": 32, "cache": str(cache)},
            "optim": {"lr": 3e-3},
            "run": {"steps": 12, "batch_size": 8, "log_every": 1, "checkpoint_every": 4},
        }
        for path, value in overrides.items():
            at = data
            *sections, name = path.split("__")
            for section in sections:
                at = at.setdefault(section, {})
            at[name] = value
        return data

    return make


@pytest.fixture
def recipe(settings: Callable[..., dict[str, Any]]) -> Callable[..., Recipe]:
    """Like `settings`, as a Recipe."""
    return lambda **overrides: Recipe.parse(settings(**overrides))
