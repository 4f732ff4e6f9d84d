"""Text out of installed files, without executing or importing any of them."""

from __future__ import annotations

import ast
import inspect
import io
import pickletools
import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "catalogue_strings",
    "decode",
    "digit_share",
    "foreign_share",
    "help_topics",
    "pickled_strings",
    "read_text",
    "split_python",
]

MIN_DOCSTRING = 64
"""Characters; shorter docstrings repeat the name of what they document."""

_WORD = re.compile(r"[^\W\d_]{3}")


def read_text(path: Path) -> str | None:
    """A file's text, or None if it is anything else (binary, another encoding, no regular file).

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_file():
        return None  # a pipe would wait for ever
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        return None if b"\0" in head else decode(head + file.read())


def decode(raw: bytes) -> str | None:
    """UTF-8 text with Unix newlines, or None."""
    if b"\0" in raw:
        return None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # templates, deliberately broken test files, Python 2


def _first_statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """The first statement of the module, of every class and function. Expressions, most of a tree, are not visited."""
    below: list[ast.AST] = [tree]
    while below:
        node = below.pop()
        body = getattr(node, "body", None)
        if body and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield body[0]
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            inner = getattr(node, block, None)
            if isinstance(inner, list):
                below.extend(inner)


def split_python(source: str) -> tuple[str, str] | None:
    """Python source as (code without docstrings, docstrings in order), or None if it does not parse.

    The two parts share no text, so that "python" and "prose" teach different things and nothing held out in one
    domain is seen in the other.
    """
    tree = _parse(source)
    if tree is None:
        return None
    lines: list[str | None] = list(source.split("\n"))
    found: list[tuple[int, str]] = []
    for first in _first_statements(tree):
        if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
            continue
        value, end = first.value.value, first.end_lineno
        if not isinstance(value, str) or end is None or first.end_col_offset is None:
            continue
        head, tail = lines[first.lineno - 1] or "", lines[end - 1] or ""
        alone = not head.encode()[: first.col_offset].strip() and not tail.encode()[first.end_col_offset :].strip()
        if alone:
            found.append((first.lineno, inspect.cleandoc(value)))
            lines[first.lineno - 1 : end] = [None] * (end - first.lineno + 1)
    prose = "\n\n".join(text for _, text in sorted(found) if len(text) >= MIN_DOCSTRING)
    return "\n".join(line for line in lines if line is not None), prose


def help_topics(source: str) -> list[str]:
    """The texts of a module that is one dictionary of long strings, as ``pydoc_data/topics.py`` is."""
    tree = _parse(source)
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign)] if tree else []
    values = [value for table in tables if isinstance(table, ast.Dict) for value in table.values]
    return [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]


def catalogue_strings(raw: bytes) -> list[str]:
    """The translations in a GNU ``.mo`` catalogue. ``gettext`` itself would execute the plural formula of the file."""
    for order in "<>":
        if raw[:4] == struct.pack(order + "I", 0x950412DE) and len(raw) >= 20:
            break
    else:
        return []
    strings: list[str] = []
    try:
        count, _, start = struct.unpack_from(order + "3I", raw, 8)
        for i in range(min(count, len(raw) // 8)):
            length, offset = struct.unpack_from(order + "2I", raw, start + 8 * i)
            strings.extend(raw[offset : offset + length].decode("utf-8").split("\0"))
    except (struct.error, UnicodeDecodeError):
        return []
    return [s for s in strings[1:] if s]  # the first entry is the header


def pickled_strings(raw: bytes) -> list[str]:
    """The words in a pickled table (locale data ships this way). Reads the opcodes; nothing is unpickled."""
    if not raw.startswith(b"\x80"):
        return []
    try:
        found = [arg for op, arg, _ in pickletools.genops(io.BytesIO(raw)) if op.name.endswith("UNICODE")]
    except (ValueError, EOFError, UnicodeDecodeError):
        return []
    return [s for s in found if isinstance(s, str) and _WORD.search(s)]


def digit_share(text: str) -> float:
    """Digits as a share of the characters that are not white space."""
    solid = len(text) - sum(map(text.count, " \n\t"))
    return sum(map(text.count, "0123456789")) / max(1, solid)


def foreign_share(text: str) -> float:
    """Letters outside ASCII as a share of all letters."""
    if text.isascii():
        return 0.0
    letters = [c for c in text if c.isalpha()]
    return sum(c > "\x7f" for c in letters) / max(1, len(letters))
