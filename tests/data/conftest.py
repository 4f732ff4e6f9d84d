"""A small corpus of three domains, and a tokenizer trained on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from collegium.data import Corpus, open_corpus, train_tokenizer

WORDS = ["the", "expert", "of", "a", "token", "reads", "what", "router", "and", "gate", "decide", "once", "more"]


def write_corpus(root: Path, documents: int = 60) -> Path:
    """Three folders of short documents: English-like words, sums, and Cyrillic."""
    draw = random.Random(0)
    for number in range(documents):
        texts = {
            "prose": " ".join(draw.choices(WORDS, k=draw.randint(5, 60))),
            "sums": "\n".join(f"{a}+{a}={2 * a}" for a in draw.choices(range(1000), k=draw.randint(2, 30))),
            "russian": " ".join(draw.choices(["эксперт", "слово", "дом", "и", "в", "не"], k=draw.randint(5, 40))),
        }
        for domain, text in texts.items():
            file = root / domain / f"{number:03d}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{number} {text}\n", encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def corpus_writer() -> Callable[..., Path]:
    return write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return open_corpus(write_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="session")
def tokenizer(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return train_tokenizer(corpus, 320, tmp_path_factory.mktemp("tokenizer"))
