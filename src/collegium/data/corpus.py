"""A corpus: documents with domain labels, in three splits, with a fingerprint. Opened from many kinds of sources."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from collegium.data.document import SPLITS, TEST, VALID, Document, Row, Split, digest, split_of
from collegium.data.local import LOCAL_BYTES, LocalSource
from collegium.data.sources import DatasetsSource, FolderSource, JsonlSource, ParquetSource
from collegium.errors import ConfigError, DataError

__all__ = ["Corpus", "Document", "open_corpus"]


class Corpus:
    """Documents that can be read again and again, one pass each, from memory or from disk.

    Opening a corpus reads it once: every record is checked, and sizes, domains and the fingerprint are then known.
    A source's own splits are kept. Without them a document's content decides, so that adding documents moves no other
    one; except that a domain too small to have anything held out by chance gives up the training documents of lowest
    hash, first to "valid", then to "test".

    Attributes:
        name: what was opened.
        domains: the domain labels, sorted. A label's index here is its id everywhere else.
        skipped: how many items of the source were left out, by reason.
    """

    def __init__(self, name: str, source: Iterable[Row]) -> None:
        """`source` starts a fresh pass over (document, its own split or None) each time it is iterated.

        Raises:
            DataError: there is no document.
        """
        self.name = name
        self._source = source
        self._moved: dict[tuple[str, bytes], Split] = {}
        self._documents: Counter[tuple[str, Split]] = Counter()
        self._bytes: Counter[tuple[str, Split]] = Counter()
        self._sum = 0
        self._scan()
        self.skipped: dict[str, int] = dict(getattr(source, "skipped", {}))
        self.domains = sorted({domain for domain, _ in self._documents})
        if not self.domains:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items()) or "nothing found"
            raise DataError(f"the corpus {name} is empty: no document with any text in it ({reasons})")

    def _scan(self) -> None:
        # per domain, the two training contents of lowest hash: (documents, bytes) with that content
        lowest: dict[str, dict[bytes, tuple[int, int]]] = {}
        for document, given in self._source:
            key, size = digest(document.text), len(document.text.encode())
            split = given or split_of(key)
            self._documents[document.domain, split] += 1
            self._bytes[document.domain, split] += size
            # a sum, not a list: the same for every order of the documents, and no memory however many there are
            self._sum += int.from_bytes(digest(f"{document.domain}\0{given or ''}\0{key.hex()}"), "big")
            if given is None and split == "train":
                low = lowest.setdefault(document.domain, {})
                times, total = low.get(key, (0, 0))
                low[key] = (times + 1, total + size)
                if len(low) > 2:
                    del low[max(low)]
        for domain, low in lowest.items():
            self._fill_empty(domain, low)

    def _fill_empty(self, domain: str, low: dict[bytes, tuple[int, int]]) -> None:
        empty: list[Split] = [split for split in SPLITS if not self._documents[domain, split]]
        for split, (key, (times, total)) in zip(empty, sorted(low.items()), strict=False):
            if self._documents[domain, "train"] == times:
                return
            self._moved[domain, key] = split
            self._documents.update({(domain, "train"): -times, (domain, split): times})
            self._bytes.update({(domain, "train"): -total, (domain, split): total})

    def documents(self, split: Split | None = None) -> Iterator[Document]:
        """One pass over the documents of a split, or of all, in the order of the source.

        Raises:
            ConfigError: there is no such split.
        """
        if split not in (None, *SPLITS):
            raise ConfigError(f"no split is named {split!r}; the splits are {', '.join(SPLITS)}")
        for document, given in self._source:
            if split is None:
                yield document
                continue
            key = digest(document.text)
            if split == (self._moved.get((document.domain, key)) or given or split_of(key)):
                yield document

    def size(self, split: Split, domain: str | None = None) -> tuple[int, int]:
        """(documents, bytes of UTF-8) of a split, of one domain or of all."""
        wanted = self.domains if domain is None else [domain]
        return sum(self._documents[d, split] for d in wanted), sum(self._bytes[d, split] for d in wanted)

    def fingerprint(self) -> str:
        """32 hexadecimal digits that depend on every document's content, domain and split, and not on their order."""
        rule = int.from_bytes(digest(f"{TEST} {VALID}"), "big")
        return f"{(self._sum + rule) % 2**128:032x}"

    def summary(self) -> dict[str, Any]:
        """Documents and bytes per domain and split, as plain data."""
        domains: dict[str, Any] = {}
        for domain in self.domains:
            sizes = {split: self.size(split, domain) for split in SPLITS}
            domains[domain] = {s: {"documents": count, "bytes": total} for s, (count, total) in sizes.items()}
        return {"name": self.name, "fingerprint": self.fingerprint(), "domains": domains, "skipped": self.skipped}


def open_corpus(
    spec: Any,
    *,
    text: str | None = None,
    domain: str | None = None,
    max_bytes_per_domain: int | None = None,
) -> Corpus:
    """Open a corpus.

    Args:
        spec: ``"local"`` (what this Python installation holds); a folder (each subfolder a domain; subfolders named
            train, valid, test on top are splits); a ``.jsonl`` or ``.parquet`` file; or a ``datasets`` object
            (Dataset, IterableDataset, or a DatasetDict whose keys are splits).
        text: the field with the text (files and datasets); by default "text".
        domain: the field with the domain; by default "domain" if there is one, else all is one domain.
        max_bytes_per_domain: budget of each domain of the local corpus, by default 8 MB.

    Raises:
        DataError: `spec` is none of these, a record is unreadable (the message says where), or nothing is in it.
        ConfigError: an option that this kind of source does not have.
    """
    if isinstance(spec, str) and spec == "local":
        _refuse(spec, text=text, domain=domain)
        budget = LOCAL_BYTES if max_bytes_per_domain is None else max_bytes_per_domain
        if budget < 1:
            raise ConfigError(f"max_bytes_per_domain is {budget}; it must be positive")
        return Corpus("local", LocalSource(max_bytes_per_domain=budget))
    _refuse(_shown(spec), max_bytes_per_domain=max_bytes_per_domain)
    if not isinstance(spec, str | os.PathLike):
        return Corpus(_shown(spec), DatasetsSource(spec, text or "text", domain))
    path = Path(spec)
    if path.is_dir():
        _refuse(str(path), text=text, domain=domain)
        folder = FolderSource(path)
        corpus = Corpus(str(path), folder)
        if count := folder.skipped["not text"]:
            warnings.warn(
                f"left out {count} files in {path} that are not UTF-8 text, first {folder.example}", stacklevel=2
            )
        return corpus
    reader = _READERS.get(path.suffix.lower())
    if reader is None or not path.is_file():
        raise DataError(f"no corpus at {str(path)!r}: it must be 'local', a folder, or a .jsonl or .parquet file")
    return Corpus(str(path), reader(path, text or "text", domain))


_READERS: dict[str, type[JsonlSource] | type[ParquetSource]] = {
    ".jsonl": JsonlSource,
    ".ndjson": JsonlSource,
    ".parquet": ParquetSource,
}


def _refuse(name: str, **options: Any) -> None:
    for option, value in options.items():
        if value is not None:
            raise ConfigError(f"the corpus {name} has no option {option} (given: {value!r})")


def _shown(spec: Any) -> str:
    return str(spec) if isinstance(spec, str | os.PathLike) else f"datasets.{type(spec).__name__}"
