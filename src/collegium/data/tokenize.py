"""Tokenizers: training a byte-level BPE on a corpus, encoding without surprises, and counting bytes per token."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from collegium.data.corpus import Corpus
from collegium.data.document import fraction
from collegium.errors import ConfigError, DataError
from collegium.files import atomic_dir

__all__ = ["encode_texts", "token_bytes", "tokenizer_fingerprint", "train_tokenizer"]

END, PAD = "<|endoftext|>", "<|pad|>"
SAMPLE_PER_DOMAIN = 2_000_000
"""Bytes of training text taken from each domain, so that a large domain does not spend the vocabulary of the others."""
_PIECE = 4096
_SAVED = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
_WORDS = r" ?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
"""What merges never cross: words, numbers of up to three digits, runs of signs, ends of lines, indentation."""


def train_tokenizer(corpus: Corpus, vocab_size: int, out: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al., 2016; bytes: Radford et al., 2019) and save it in `out`.

    Deterministic in the corpus and `vocab_size`. It sees at most 2 MB of each domain's training split. Any text can
    be encoded and comes back unchanged; ``<|endoftext|>`` (id 0) begins and ends documents, ``<|pad|>`` is id 1.

    Raises:
        ConfigError: `vocab_size` has no room for the 256 bytes and the two special tokens, or `out` is a folder that
            holds other things, which saving would replace.
        DataError: the corpus has too little text for so many tokens.
    """
    out, smallest = Path(out), 256 + 2
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size is {vocab_size}; 256 bytes and 2 special tokens need at least {smallest}")
    foreign = {entry.name for entry in out.iterdir()} - _SAVED if out.is_dir() else set()
    if foreign:
        raise ConfigError(f"{out} is not a tokenizer's folder: it holds {min(foreign)}; give a new or an empty folder")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(corpus), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"the training text of {corpus.name} only gives {tokenizer.get_vocab_size()} tokens; "
            f"set vocab_size (now {vocab_size}) to that or less, or use a larger corpus"
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    with atomic_dir(out) as folder:
        fast.save_pretrained(folder)
    return fast


def _sample(corpus: Corpus) -> Iterator[str]:
    """Pieces of the training split, each kept or not by its own hash, about `SAMPLE_PER_DOMAIN` bytes a domain."""
    share = {d: SAMPLE_PER_DOMAIN / max(1, corpus.size("train", d)[1]) for d in corpus.domains}
    for document in corpus.documents("train"):
        for start in range(0, len(document.text), _PIECE):
            piece = document.text[start : start + _PIECE]
            if fraction(hashlib.blake2b(b"piece" + piece.encode(), digest_size=8).digest()) < share[document.domain]:
                yield piece


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as it stands: nothing added, and the names of special tokens in it are ordinary text.

    Sources of tokenizers and models spell out "<|endoftext|>"; as a token it would end a document in its middle.
    """
    backend = _backend(tokenizer)
    special, truncation, padding = backend.encode_special_tokens, backend.truncation, backend.padding
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = special
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """32 hexadecimal digits that depend on everything which decides the ids of a text, and the end token."""
    state = json.loads(_backend(tokenizer).to_str())
    state = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    state = json.dumps([state, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.blake2b(state.encode(), digest_size=16).hexdigest()


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """How many bytes of UTF-8 each token stands for; 0 for special tokens and unused ids.

    Summed over `encode_texts` of a text it is exactly the text's length in bytes. Tokenizers that put a space before
    a text (Llama 2, Mixtral) count that space too, one byte more per text, and take U+2581 for a space.

    Returns:
        int64 array [V], V being the highest id plus 1.

    Raises:
        DataError: the tokenizer changes or loses text (it normalises, or has an unknown token for what it lacks), so
            its tokens stand for no definite number of bytes.
    """
    backend = _backend(tokenizer)
    state = json.loads(backend.to_str())
    byte_level = _has(state["pre_tokenizer"], "ByteLevel") or _has(state["decoder"], "ByteLevel")
    vocab = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    sizes = np.zeros(max(vocab.values()) + 1, dtype=np.int64)
    for token, index in vocab.items():
        if index in added:
            sizes[index] = 0 if added[index].special else len(token.encode())
        elif byte_level:
            sizes[index] = len(token)  # one character stands for one byte
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            sizes[index] = 1
        else:
            sizes[index] = len(token.replace("\u2581", " ").encode())
    _probe(tokenizer, sizes)
    return sizes


_PROBES = (
    "The quick brown fox, 1234567 times.",
    "  two  spaces\n\n\tand tabs \r\n",
    "Größe, façade, e\u0301 as two characters, ﬁ, ½, \u00a0, full width Ａ",
    "Москва 東京 กรุงเทพ हिन्दी العربية",
    "🦊👩‍🔬 \u0000\u0001\u200b\ufeff\U0010ffff",
    "CamelCase_and_snake(x)[0] -> {'k': 1e-5};",
)


def _probe(tokenizer: PreTrainedTokenizerFast, sizes: np.ndarray) -> None:
    """Check the counts on text of many scripts: what no rule about tokenizers can promise."""
    counted = [int(sizes[ids].sum()) for ids in encode_texts(tokenizer, _PROBES)]
    excess = [count - len(probe.encode()) for count, probe in zip(counted, _PROBES, strict=True)]
    for probe, more in zip(_PROBES, excess, strict=True):
        if more not in (0, 1) or more != excess[0]:
            raise DataError(
                f"this tokenizer ({type(tokenizer).__name__}) does not keep text as it is, for example {probe!r}: bits "
                "per byte are not defined for it; use a tokenizer that is byte-level or falls back to bytes"
            )


def _has(state: Any, kind: str) -> bool:
    if isinstance(state, dict):
        return state.get("type") == kind or any(_has(value, kind) for value in state.values())
    return isinstance(state, list) and any(_has(value, kind) for value in state)


def _backend(tokenizer: Any) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"{type(tokenizer).__name__} is a slow tokenizer; load the fast one (AutoTokenizer does)")
    return backend
