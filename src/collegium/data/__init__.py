"""What a model reads: corpora with domain labels, tokenizers, packed sequences."""

from __future__ import annotations

from collegium.data.corpus import Corpus, Document, open_corpus
from collegium.data.pack import Packed, pack
from collegium.data.sequences import document_batches
from collegium.data.tokenize import encode_texts, token_bytes, train_tokenizer

__all__ = [
    "Corpus",
    "Document",
    "Packed",
    "document_batches",
    "encode_texts",
    "open_corpus",
    "pack",
    "token_bytes",
    "train_tokenizer",
]
