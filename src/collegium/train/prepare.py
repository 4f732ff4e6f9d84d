"""From a recipe's data section to what the loop reads: a tokenizer, packed sequences, and the bytes of each token.

Tokenizers and packed sequences are kept in ``data.cache``, named by what they were made from, so that runs on the same
corpus (a model and its dense twin) share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from collegium.data import Corpus, Packed, open_corpus, pack, token_bytes, train_tokenizer
from collegium.errors import ConfigError
from collegium.train.ranks import Ranks
from collegium.train.recipe import Recipe

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """Training sequences (documents of all domains mixed), held-out sequences (packed by domain), and the rest."""

    tokenizer: PreTrainedTokenizerBase
    train: Packed
    valid: Packed
    token_bytes: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Of the corpus and the tokenizer."""
        return f"{self.train.meta['corpus']}/{self.train.meta['tokenizer']}"


def prepare(recipe: Recipe, ranks: Ranks) -> Prepared:
    """Tokenizer and packed data of a recipe; the first process makes what is not in the cache, then all read it.

    Raises:
        ConfigError: the tokenizer folder cannot be read.
        DataError: the corpus cannot be read, or holds too little.
    """
    if not ranks.first:
        ranks.barrier()
    spec = recipe.data
    cache = spec.cache.expanduser()
    corpus = open_corpus(spec.corpus, **spec.options)
    tokenizer = _tokenizer(recipe, corpus, cache)
    train = pack(corpus, tokenizer, "train", spec.sequence_length, cache / "packed")
    valid = pack(corpus, tokenizer, "valid", spec.sequence_length, cache / "packed", by_domain=True)
    if ranks.first:
        ranks.barrier()
    return Prepared(tokenizer, train, valid, token_bytes(tokenizer))


def _tokenizer(recipe: Recipe, corpus: Corpus, cache: Path) -> PreTrainedTokenizerBase:
    folder = recipe.data.tokenizer or recipe.model.checkpoint
    if folder is None:
        folder = cache / "tokenizers" / f"{corpus.fingerprint()[:16]}-{recipe.data.vocab_size}"
        if not folder.exists():
            return train_tokenizer(corpus, recipe.data.vocab_size, folder)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder} holds no tokenizer.json; set data.tokenizer to a folder with one")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
