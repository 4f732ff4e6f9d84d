"""Packing: documents as one stream of tokens, cut into sequences of equal length, in memory-mapped files.

Shape legend: N sequences, S sequence length, D documents, B sequences in a batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerFast

from collegium.data.corpus import Corpus
from collegium.data.document import Document, Split
from collegium.data.tokenize import encode_texts, tokenizer_fingerprint
from collegium.errors import ConfigError, DataError
from collegium.files import atomic_dir
from collegium.rng import generator

__all__ = ["Packed", "pack"]

VERSION = 1
_CHARACTERS = 2_000_000
"""Text tokenised at a time: what bounds memory, whatever the size of the corpus."""
_TOKENS = 1 << 20
"""Tokens written at a time."""


@dataclass(frozen=True)
class Packed:
    """Token sequences of equal length on disk. Reading a batch reads only its sequences.

    Attributes:
        tokens: [N, S] uint16 or uint32. Each document ends with the tokenizer's end token.
        document: [N, S] int32, the number of the document each token belongs to.
        domain_of_document: [D] uint16, an index into `domains`. Documents are numbered in the order they are packed.
        domains: the domain labels of the corpus.
        meta: what it was made of, and how many tokens at the end did not fill a sequence and were dropped.
    """

    tokens: np.ndarray
    document: np.ndarray
    domain_of_document: np.ndarray
    domains: list[str]
    meta: dict[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Packed:
        """Open a folder that `pack` wrote.

        Raises:
            DataError: a file is missing or has not the size recorded when it was written.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            for name, size in meta["files"].items():
                found = (folder / name).stat().st_size
                if found != size:
                    raise DataError(f"{folder / name} is damaged: {found} bytes instead of {size}")
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "document")}
            domain_of_document = np.load(folder / "domain_of_document.npy")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is no complete pack: {error}") from error
        return cls(arrays["tokens"], arrays["document"], domain_of_document, meta["domains"], meta)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sequence_length(self) -> int:
        return self.tokens.shape[1]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """[N] int64: a permutation of the sequences, the same for the same key everywhere."""
        return torch.randperm(len(self), generator=generator("order", seed, epoch)).numpy()

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """The sequences at `indices`, each value int64 [B, S].

        ``input_ids``; ``document``, the number of the document; ``domain``, an index into `domains`; ``position``,
        which starts from 0 at every document and at the start of the sequence (a sequence may begin inside one).
        """
        rows = np.asarray(indices, dtype=np.int64)
        document = self.document[rows]
        starts = np.zeros(document.shape, dtype=np.int64)
        steps = np.arange(document.shape[1], dtype=np.int64)
        starts[:, 1:] = np.where(document[:, 1:] != document[:, :-1], steps[1:], 0)
        fields = {
            "input_ids": self.tokens[rows],
            "document": document,
            "domain": self.domain_of_document[document],
            "position": steps - np.maximum.accumulate(starts, axis=1),
        }
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in fields.items()}


def pack(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    split: Split,
    sequence_length: int,
    folder: str | os.PathLike[str],
    *,
    by_domain: bool = False,
) -> Packed:
    """Tokenise a split and cut it into sequences; kept in a subfolder of `folder` and reused next time.

    Documents are shuffled (by a fixed key), joined, each followed by the end token, and cut every `sequence_length`
    tokens, across document boundaries. What does not fill the last sequence is dropped. The subfolder's name is a hash
    of everything that decides its content; memory in use does not grow with the corpus.

    Args:
        sequence_length: tokens in a sequence. Labels are the same tokens: a model shifts them itself.
        by_domain: keep the domains one after another and never mix two in one sequence (for evaluation).

    Raises:
        ConfigError: no end token, or a sequence shorter than 2.
        DataError: the split has fewer tokens than one sequence, or the corpus on disk has changed since it was opened.
        StorageError: it could not be written.
    """
    if sequence_length < 2:
        raise ConfigError(f"sequence_length is {sequence_length}; it must be at least 2")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer {type(tokenizer).__name__} has no eos_token to end documents with")
    if len(corpus.domains) > np.iinfo(np.uint16).max:
        raise DataError(f"{corpus.name} has {len(corpus.domains)} domains; is its domain field really a label?")
    made_of = {
        "version": VERSION,
        "corpus": corpus.fingerprint(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "split": split,
        "sequence_length": sequence_length,
        "by_domain": by_domain,
    }
    key = hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=8).hexdigest()
    target = Path(folder) / f"{split}-{key}"
    if target.exists():
        try:
            return Packed.open(target)
        except DataError as error:
            warnings.warn(f"packing again: {error}", stacklevel=2)
    with atomic_dir(target) as partial:
        facts = _fill(partial, corpus, tokenizer, split, sequence_length, by_domain)
        files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        (partial / "meta.json").write_text(json.dumps({**made_of, **facts, "files": files}, indent=1), encoding="utf-8")
    return Packed.open(target)


def _fill(
    folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, split: Split, length: int, by_domain: bool
) -> dict[str, Any]:
    """Write the arrays of a `Packed`; returns what its `meta` says about them."""
    highest = max(tokenizer.get_vocab().values())
    stream = _Stream(folder / "stream.bin", np.dtype(np.uint16 if highest < 2**16 else np.uint32))
    stream.write(corpus, tokenizer, split)
    if (len(stream.ends), stream.bytes) != corpus.size(split):
        raise DataError(f"{corpus.name} has changed since it was opened; open it again")
    filled = _cut(stream, _document_order(stream, corpus, split, by_domain), length, by_domain, folder)
    total = len(stream.tokens)
    if not filled.sum():
        where = " in one domain" if by_domain else ""
        raise DataError(f"the {split} split of {corpus.name} has {total} tokens: no sequence of {length}{where}")
    present = np.bincount(np.asarray(stream.domains), minlength=len(corpus.domains)) > 0
    if by_domain:
        present[: len(filled)] &= filled > 0
    missing = [domain for domain, there in zip(corpus.domains, present, strict=True) if not there]
    if missing:
        warnings.warn(f"no {split} sequence of {length} tokens could be filled from {', '.join(missing)}", stacklevel=3)
    stream.delete()
    dropped = total - int(filled.sum()) * length
    return {"name": corpus.name, "domains": corpus.domains, "dropped_tokens": dropped}


class _Stream:
    """The tokens of a split in the corpus's own order, on disk; where each document ends, and its domain, in memory."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype = path, dtype
        self.ends, self.domains = array("q"), array("H")
        self.tokens = np.empty(0, dtype)
        self.bytes = 0

    def write(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, split: Split) -> None:
        number_of = {domain: number for number, domain in enumerate(corpus.domains)}
        end, console = tokenizer.eos_token_id, Console(stderr=True)
        with (
            open(self.path, "wb") as file,
            Progress(console=console, disable=not console.is_terminal) as progress,
        ):
            bar = progress.add_task(f"tokenising {split}", total=corpus.size(split)[0])
            for documents in _batches(corpus.documents(split)):
                ids_of = encode_texts(tokenizer, [document.text for document in documents])
                for document, tokens in zip(documents, ids_of, strict=True):
                    file.write(np.asarray([*tokens, end], dtype=self.dtype).tobytes())
                    self.ends.append((self.ends[-1] if self.ends else 0) + len(tokens) + 1)
                    self.domains.append(number_of[document.domain])
                    self.bytes += len(document.text.encode())
                progress.advance(bar, len(documents))
        if self.ends:
            self.tokens = np.memmap(self.path, dtype=self.dtype, mode="r")

    def delete(self) -> None:
        del self.tokens
        self.path.unlink()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _document_order(stream: _Stream, corpus: Corpus, split: Split, by_domain: bool) -> np.ndarray:
    """[D]: which document comes where; with `by_domain`, shuffled within each domain only.

    The key has no tokenizer and no length in it: models with different ones read the same text in the same order.
    """
    key = generator("pack", corpus.fingerprint(), split)
    shuffled = torch.randperm(len(stream.ends), generator=key).numpy()
    if not by_domain:
        return shuffled
    return shuffled[np.argsort(np.asarray(stream.domains)[shuffled], kind="stable")]


def _cut(stream: _Stream, order: np.ndarray, length: int, by_domain: bool, folder: Path) -> np.ndarray:
    """Write the arrays of a `Packed` in `folder`. Returns how many sequences each group of documents fills.

    A group is what may share a sequence: a domain, or everything. Files are written in the plain way and not through a
    memory map, where a full disk would end the process instead of raising an error.
    """
    ends, domain = np.asarray(stream.ends), np.asarray(stream.domains)[order]
    starts = np.concatenate([[0], ends])[:-1].astype(np.int64)
    sizes = (ends - starts)[order]
    group = domain if by_domain else np.zeros_like(domain)
    filled = np.bincount(group, weights=sizes).astype(np.int64) // length
    left = filled * length
    with open(folder / "tokens.npy", "wb") as tokens, open(folder / "document.npy", "wb") as documents:
        for file, dtype in ((tokens, stream.dtype), (documents, np.dtype(np.int32))):
            header = {"descr": dtype.str, "fortran_order": False, "shape": (int(filled.sum()), length)}
            np.lib.format.write_array_header_1_0(file, header)
        pieces: list[np.ndarray] = []
        numbers: list[int] = []
        waiting = 0
        for number, (source, size) in enumerate(zip(order.tolist(), sizes.tolist(), strict=True)):
            size = min(size, int(left[group[number]]))
            left[group[number]] -= size
            pieces.append(stream.tokens[starts[source] : starts[source] + size])
            numbers.append(number)
            waiting += size
            if waiting >= _TOKENS or number == len(order) - 1:
                tokens.write(np.concatenate(pieces).tobytes())
                documents.write(np.repeat(np.asarray(numbers, np.int32), list(map(len, pieces))).tobytes())
                pieces, numbers, waiting = [], [], 0
    np.save(folder / "domain_of_document.npy", domain.astype(np.uint16))
    return filled
