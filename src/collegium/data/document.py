"""One document, the hash that identifies it, and the split that follows from the hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

__all__ = ["SPLITS", "TEST", "VALID", "Document", "Row", "Split", "digest", "fraction", "split_of"]

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")

TEST, VALID = 0.03, 0.03
"""Shares of documents held out, where a source has no splits of its own."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text (Unix newlines), the domain it belongs to, and a name to find it by (a path, a line number)."""

    text: str
    domain: str
    name: str


Row = tuple[Document, Split | None]
"""A document and the split its source puts it in, if the source has splits."""


def digest(text: str) -> bytes:
    """16 bytes that identify the content of a document, on every machine and Python version."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def fraction(key: bytes) -> float:
    """A number in [0, 1) from a digest, uniform over contents."""
    return (int.from_bytes(key[:8], "big") >> 11) / 2**53


def split_of(key: bytes) -> Split:
    """The split of a document by its content alone, so that adding documents moves no other one."""
    u = fraction(key)
    return "test" if u < TEST else "valid" if u < TEST + VALID else "train"
