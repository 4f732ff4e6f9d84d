"""What the tests of judging share: a tokenizer of bytes, and corpora of known text."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from collegium.data import Corpus, Document

VOCABULARY = 258
TEXTS = {
    "prose": ("a router decides which expert speaks", "every token goes to two experts of eight", "none is dropped"),
    "sums": ("1 + 1 = 2\n2 + 2 = 4\n3 + 3 = 6", "10 - 3 = 7\n10 - 4 = 6", "5 + 5 = 10"),
}


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; 0 begins and ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0, "<|pad|>": 1} | {letter: 2 + i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|pad|>"
    )


def made_up_corpus(texts: dict[str, tuple[str, ...]] = TEXTS) -> Corpus:
    """Everything is in the test split."""
    return Corpus(
        "made up",
        [
            (Document(text, domain, f"{domain}{i}"), "test")
            for domain, own in texts.items()
            for i, text in enumerate(own)
        ],
    )
