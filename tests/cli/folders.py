"""A tiny model folder with a tokenizer, and a corpus, made once for the tests of the verbs."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from collegium.data import open_corpus, train_tokenizer
from tiny import tiny_model

TEXTS = {
    "prose": ["a router decides which expert speaks", "every token goes to two experts of eight"],
    "sums": ["1 + 1 = 2\n2 + 2 = 4\n3 + 3 = 6", "10 - 3 = 7\n10 - 4 = 6"],
}
VOCABULARY = 260


@cache
def corpus_folder() -> Path:
    """Two domains of two short documents each."""
    root = Path(mkdtemp(prefix="corpus-"))
    for domain, texts in TEXTS.items():
        for number, text in enumerate(texts):
            file = root / domain / f"{number}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
    return root


@cache
def _tokenizer_folder() -> Path:
    folder = Path(mkdtemp(prefix="tokenizer-")) / "tokenizer"
    train_tokenizer(open_corpus(corpus_folder()), VOCABULARY, folder)
    return folder


def model_folder(
    root: Path, family: str = "qwen3_moe", *, tokenizer: bool = True, fused: bool = False, **overrides: object
) -> Path:
    """A random model of `family` under `root`, with its tokenizer. `fused` stores experts as they are in memory."""
    folder = root / family
    overrides = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "eos_token_id": 0} | overrides
    tiny_model(family, **overrides).save_pretrained(folder, save_original_format=not fused)
    if tokenizer:
        shutil.copytree(_tokenizer_folder(), folder, dirs_exist_ok=True)
    return folder
