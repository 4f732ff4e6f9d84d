"""A corpus of two made-up languages, a tiny model with a tokenizer for it, and a smaller one made of it."""

from __future__ import annotations

import random
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import AutoTokenizer

from collegium.benchmarks.shrink import halve
from collegium.compress.recover.teacher import About
from collegium.compress.rewrite import apply_plan
from collegium.data import Corpus, Packed, open_corpus, pack, train_tokenizer
from tiny import tiny_model

VOCABULARY, LENGTH = 300, 32


@cache
def corpus() -> Corpus:
    """Domains "count" (numbers in order) and "song" (few words, shuffled), with training and held-out documents."""
    folder = Path(mkdtemp(prefix="corpus-"))
    draw = random.Random(0)
    words = ["sun", "moon", "river", "stone", "wind", "fire", "rain"]
    for n in range(60):
        start = draw.randrange(1000)
        texts = {
            "count": " ".join(str(start + i) for i in range(60)),
            "song": " ".join(draw.choice(words) for _ in range(60)) + ".\n",
        }
        for domain, text in texts.items():
            place = folder / ("valid" if n % 8 == 0 else "train") / domain
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{n}.txt").write_text(text, encoding="utf-8")
    return open_corpus(folder)


@cache
def tokenizer_folder() -> Path:
    folder = Path(mkdtemp(prefix="tokenizer-")) / "tokenizer"
    train_tokenizer(corpus(), VOCABULARY, folder)
    return folder


def model_folder(folder: Path, family: str = "qwen3_moe", *, dtype: str | None = None, **overrides: object) -> Path:
    """A random model of `family` with its tokenizer."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "eos_token_id": 0, "bos_token_id": 0}
    model = tiny_model(family, **(sizes | overrides))
    if dtype is not None:
        model.to(dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    shutil.copytree(tokenizer_folder(), folder, dirs_exist_ok=True)
    return folder


@cache
def pair(dtype: str | None = None) -> tuple[Path, Path]:
    """``(student, teacher)``: a model, and what is left of it with half of its experts."""
    root = Path(mkdtemp(prefix="pair-"))
    teacher = model_folder(root / "teacher", dtype=dtype)
    (teacher / "README.md").write_text("# A teacher\n")
    return apply_plan(halve(teacher), teacher, root / "student"), teacher


@cache
def packed() -> Packed:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    return pack(corpus(), tokenizer, "train", LENGTH, mkdtemp(prefix="packed-"))


def about(**changes: object) -> About:
    """Of a store for `packed`."""
    fields: dict[str, object] = {
        "teacher": "teacher", "fingerprint": "abc", "dtype": "as stored", "corpus": packed().meta["corpus"],
        "tokenizer": packed().meta["tokenizer"], "split": "train", "sequence_length": LENGTH, "mask_documents": True,
        "vocab_size": VOCABULARY, "candidates": 64,
    }  # fmt: skip
    return About.model_validate(fields | changes)
