"""Documents as padded batches, one document a row: what a model is traced and probed with.

Legend: B rows, S positions of the widest row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from collegium.data.corpus import Corpus
from collegium.data.document import SPLITS, Split
from collegium.data.tokenize import encode_texts

__all__ = ["document_batches"]

_TEXTS = 64
"""Documents tokenised at a time."""


class _Row(NamedTuple):
    ids: list[int]
    document: int
    domain: int


def document_batches(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    split: Split | None,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    left: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Batches of token ids. No row holds two documents; a document longer than a row goes on in the next one.

    Each document begins with the beginning-of-text token. With `max_tokens`, domains get equal shares of it, and no
    document takes more than its part of a share (or one row, if that is more): a short probe sees many documents.

    Args:
        split: documents of one split, or all.
        sequence_length: tokens in a row at most.
        max_tokens: about how many tokens in all; None means everything.
        left: pad on the left, for generating; then there is always a mask.

    Yields:
        ``input_ids [B, S]`` int64, ``attention_mask [B, S]`` int64 (absent where nothing is padded), ``document [B]``
        numbered from 0, ``domain [B]`` indices into ``corpus.domains``.
    """
    rows = _rows(corpus, tokenizer, split, sequence_length, max_tokens)
    while batch := list(islice(rows, batch_size)):
        yield _padded(batch, left)


def _rows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, split: Split | None, length: int, max_tokens: int | None
) -> Iterator[_Row]:
    left, most = _budgets(corpus, split, length, max_tokens)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    wanted = (document for document in corpus.documents(split) if left[document.domain])
    number = 0
    while any(left.values()) and (group := list(islice(wanted, _TEXTS))):
        for document, encoded in zip(group, encode_texts(tokenizer, [d.text for d in group]), strict=True):
            ids = (start + encoded)[: min(left[document.domain], most[document.domain])]
            left[document.domain] -= len(ids)
            for first in range(0, len(ids), length):
                yield _Row(ids[first : first + length], number, corpus.domains.index(document.domain))
            number += 1


def _budgets(
    corpus: Corpus, split: Split | None, length: int, max_tokens: int | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Tokens for each domain, and for each of its documents."""
    if max_tokens is None:
        everything = dict.fromkeys(corpus.domains, sys.maxsize)
        return everything, dict(everything)
    splits = SPLITS if split is None else (split,)
    documents = {domain: sum(corpus.size(s, domain)[0] for s in splits) for domain in corpus.domains}
    share = -(-max_tokens // len(corpus.domains))
    return (
        dict.fromkeys(corpus.domains, share),
        {domain: max(length, -(-share // max(1, count))) for domain, count in documents.items()},
    )


def _padded(rows: list[_Row], left: bool) -> dict[str, Tensor]:
    width = max(len(row.ids) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row.ids), width) if left else slice(0, len(row.ids))
        input_ids[number, place] = torch.tensor(row.ids)
        mask[number, place] = 1
    # a mask without padding only costs attention its fast path
    padding = {"attention_mask": mask} if left or not bool(mask.all()) else {}
    return {
        "input_ids": input_ids,
        **padding,
        "document": torch.tensor([row.document for row in rows]),
        "domain": torch.tensor([row.domain for row in rows]),
    }
