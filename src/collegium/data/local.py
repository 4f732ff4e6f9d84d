"""The local corpus: what every Python installation already holds, with domain labels, no download.

Source code, documentation, headers, licences, test vectors, markup, configuration and translations differ enough to
show experts specialising. The corpus is a function of what is installed; its fingerprint says so.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from collegium.data.document import Document, Row, digest
from collegium.data.extract import (
    catalogue_strings,
    digit_share,
    foreign_share,
    help_topics,
    pickled_strings,
    read_text,
    split_python,
)

__all__ = ["LOCAL_BYTES", "LocalSource", "installed_roots"]

LOCAL_BYTES = 8_000_000
"""Default budget of a domain; some eight domains make a corpus that trains a small model for a day."""
MAX_DOCUMENT = 100_000
"""Bytes; of a longer file the part up to the last line break before this is taken, so that none dominates."""
MIN_DOCUMENT = 64
MIN_TABLE = 1000
"""Characters; a locale table with fewer words of its own only differs from its parent in formats."""
NUMERIC = 0.25
"""Share of digits from which a table or a text file counts as numbers."""
FOREIGN = 0.3
"""Share of letters outside ASCII from which a text counts as another language."""

_LICENCE = re.compile(r"(licen[cs]e|copying|notice)", re.IGNORECASE)
_COPYRIGHT = re.compile(r"^.*copyright.*$", re.IGNORECASE | re.MULTILINE)
_SUFFIXES = {
    "python": ".py",
    "c": ".h .hh .hpp .cuh .c .cc .cpp .cu",
    "markup": ".html .htm .xhtml .xml .xsl .xslt .svg",
    "javascript": ".js .mjs .ts .css .scss",
    "config": ".json .yaml .yml .toml .ini .cfg",
    "numbers": ".csv .tsv .dectest .afm .tab .zi",
    "prose": ".md .rst .txt",
    "languages": ".mo",
    "pickles": ".dat",
}
_DOMAIN = {suffix: domain for domain, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}


def installed_roots() -> list[Path]:
    """Folders of the running interpreter: standard library, installed packages, C headers."""
    paths = sysconfig.get_paths()
    return sorted({Path(paths[key]).resolve() for key in ("stdlib", "purelib", "platlib", "include")})


def _cut(text: str, size: int) -> str:
    """At most `size` bytes of `text`, in whole lines unless the lines are very long (minified sources)."""
    raw = text.encode()
    if len(raw) <= size:
        return text
    lines = raw.rfind(b"\n", 0, size) + 1
    return raw[: lines if 2 * lines > size else size].decode(errors="ignore")


@contextlib.contextmanager
def _no_cyclic_collection() -> Iterator[None]:
    """Syntax trees are large and have no cycles: searching them for some takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass
class _Collector:
    """Documents so far, within a byte budget per domain and without repetitions."""

    budget: int
    documents: list[Document] = field(default_factory=list)
    size: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    seen: set[bytes] = field(default_factory=set)

    def collect(self, roots: Sequence[Path]) -> None:
        found = sorted(_walk(roots))
        for _, name, path in found:
            kind = _kind_of(name)
            if kind and kind != "pickles" and self.wants(*_targets(kind)):
                _read(path, name, kind, self)
        if self.wants("languages"):
            _read_pickles([(name, path) for _, name, path in found if _kind_of(name) == "pickles"], self)

    def wants(self, *domains: str) -> bool:
        return any(self.budget - self.size[domain] >= MIN_DOCUMENT for domain in domains)

    def add(self, text: str, domain: str, name: str) -> None:
        if not self.wants(domain):
            return
        text = text.encode(errors="replace").decode()  # an escape in a docstring can make half a surrogate pair
        text = _cut(text.strip() + "\n", min(MAX_DOCUMENT, self.budget - self.size[domain]))
        length = len(text.encode())
        if length < MIN_DOCUMENT:
            self.skipped["shorter than 64 bytes"] += 1
            return
        # one licence comes with hundreds of packages, differing in its copyright line and its wrapping only
        key = digest(" ".join(_COPYRIGHT.sub("", text).casefold().split()))
        if key in self.seen:
            self.skipped["repeated"] += 1
            return
        self.seen.add(key)
        self.size[domain] += length
        self.documents.append(Document(text, domain, name))


class LocalSource:
    """Documents of the local corpus. They are collected once and kept (some 60 MB).

    Files are taken in the order of a hash of their path, until their domain is full: a fixed sample that neither
    package sizes nor a machine's folder order decide. Nothing found is imported or executed.
    """

    def __init__(
        self,
        roots: Sequence[Path] | None = None,
        *,
        max_bytes_per_domain: int = LOCAL_BYTES,
        min_bytes_per_domain: int = 50_000,
    ) -> None:
        """Collect the documents.

        Args:
            roots: folders to walk; by default those of the running interpreter.
            max_bytes_per_domain: budget of each domain, in bytes of UTF-8.
            min_bytes_per_domain: a domain with less than this, and less than half its budget, is left out and counted.
        """
        collector = _Collector(max_bytes_per_domain)
        with _no_cyclic_collection():
            collector.collect(installed_roots() if roots is None else roots)
        least = min(min_bytes_per_domain, max_bytes_per_domain // 2)
        thin = {domain for domain, total in collector.size.items() if total < least}
        for document in collector.documents:
            if document.domain in thin:
                collector.skipped[f"in {document.domain}, under {least} bytes in all"] += 1
        self.documents = [document for document in collector.documents if document.domain not in thin]
        self.skipped = dict(collector.skipped)

    def __iter__(self) -> Iterator[Row]:
        return ((document, None) for document in self.documents)


def _walk(roots: Sequence[Path]) -> Iterator[tuple[bytes, str, Path]]:
    """Every regular file under `roots` as (hash of its name, name below its root, path)."""
    for root in roots:
        for folder, below, files in os.walk(root):
            below[:] = [b for b in below if b not in _SKIPPED_FOLDERS]
            for file in files:
                path = Path(folder, file)
                name = path.relative_to(root).as_posix()
                yield hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), name, path


def _kind_of(name: str) -> str | None:
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if _LICENCE.match(path.name) and suffix != ".py":
        return "licences"
    if path.parent.name.endswith((".dist-info", ".egg-info")):
        return "metadata" if path.name in ("METADATA", "PKG-INFO") else None
    return _DOMAIN.get(suffix)


def _targets(domain: str) -> tuple[str, ...]:
    """The domains a file of this kind may end in."""
    more = {"python": ("prose",), "prose": ("numbers", "languages"), "metadata": ("prose", "languages"), "c": ()}
    return (domain, *more.get(domain, ("languages",)))


def _read(path: Path, name: str, domain: str, collector: _Collector) -> None:
    """Add what one file holds, under the domain that its content decides."""
    try:
        text = "\n".join(catalogue_strings(path.read_bytes())) if name.endswith(".mo") else read_text(path)
    except OSError:
        collector.skipped["not readable"] += 1
        return
    if text is None:
        collector.skipped["not UTF-8 text"] += 1
    elif domain == "python":
        _read_python(text, name, collector)
    elif domain in ("c", "licences", "languages"):
        collector.add(text, domain, name)
    elif foreign_share(text) >= FOREIGN:
        collector.add(text, "languages", name)
    elif domain == "metadata":
        collector.add(text.partition("\n\n")[2], "prose", name)  # the long description follows the headers
    elif domain in ("numbers", "prose") and digit_share(text) >= NUMERIC:
        collector.add(text, "numbers", name)
    elif domain != "numbers":
        collector.add(text, domain, name)


def _read_python(source: str, name: str, collector: _Collector) -> None:
    if name.endswith("pydoc_data/topics.py"):
        for number, topic in enumerate(help_topics(source)):
            collector.add(topic, "prose", f"{name}#{number}")
        return
    parts = split_python(source)
    if parts is None:
        collector.skipped["Python that does not parse"] += 1
        return
    code, docstrings = parts
    collector.add(code, "python", name)
    if docstrings:
        collector.add(docstrings, "prose", f"{name}#docstrings")


def _read_pickles(files: list[tuple[str, Path]], collector: _Collector) -> None:
    """Locale tables: their words, without the keys that most of the tables share."""
    tables: dict[str, list[str]] = {}
    for name, path in files:
        try:
            words = pickled_strings(path.read_bytes()) if path.is_file() else []
        except OSError:
            collector.skipped["not readable"] += 1
            continue
        if words:
            tables[name] = list(dict.fromkeys(words))
    uses = Counter(word for words in tables.values() for word in words)
    for name, words in tables.items():
        own = "\n".join(word for word in words if uses[word] * 10 <= len(tables))
        if len(own) >= MIN_TABLE:
            collector.add(own, "languages", name)
