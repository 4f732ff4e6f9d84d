"""Readers: each yields (document, split or None) afresh every time it is iterated, one record in memory at a time."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pyarrow
import pyarrow.parquet

from collegium.data.document import Document, Row, Split
from collegium.data.extract import read_text
from collegium.errors import DataError

__all__ = ["DatasetsSource", "FolderSource", "JsonlSource", "ParquetSource"]

_SPLIT_NAMES: dict[str, Split] = {"train": "train", "valid": "valid", "validation": "valid", "test": "test"}
_BATCH = 1000


class FolderSource:
    """Text files below a folder; the first subfolder is the domain, the folder's own files are under its name.

    If the subfolders on top are named train and valid or test (nothing else), they are the splits.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.skipped: Counter[str] = Counter()
        self.example = ""
        _, below, _ = next(os.walk(root, onerror=_unreadable))
        top = {name for name in below if not name.startswith(".")}
        self.has_splits = len(top) > 1 and "train" in top and top <= _SPLIT_NAMES.keys()

    def __iter__(self) -> Iterator[Row]:
        self.skipped.clear()
        for folder, below, files in os.walk(self.root, onerror=_unreadable):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for file in sorted(files):
                if not file.startswith("."):
                    yield from self._row(Path(folder, file))

    def _row(self, path: Path) -> Iterator[Row]:
        name = path.relative_to(self.root).as_posix()
        *folders, _ = name.split("/")
        split = _SPLIT_NAMES[folders.pop(0)] if self.has_splits and folders else None
        try:
            text = read_text(path)
        except OSError as error:
            _unreadable(error)
        if text is None:
            self.example = self.example or name
            self.skipped["not text"] += 1
        elif not text.strip():
            self.skipped["empty"] += 1
        else:
            yield Document(text, folders[0] if folders else self.root.resolve().name, name), split


class _Records:
    """What the kinds with fields share: taking a document out of one record."""

    def __init__(self, text: str, domain: str | None, default: str) -> None:
        self.text, self.domain, self.default = text, domain, default
        self.skipped: Counter[str] = Counter()

    def document(self, record: Mapping[str, Any], where: str, names: list[str] | None = None) -> Iterator[Document]:
        """The document in `record`, or none if its text is empty. `names` are those of a class label."""
        for field in (self.text, self.domain):
            if field is not None and field not in record:
                raise DataError(f"{where}: no field {field!r}; there are {', '.join(map(repr, record)) or 'none'}")
        text = record[self.text]
        if not isinstance(text, str):
            raise DataError(f"{where}: field {self.text!r} must be a string, got {_shown(text)}")
        label = record.get(self.domain or "domain", self.default)
        if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
            raise DataError(f"{where}: field {self.domain or 'domain'!r} must name a domain, got {_shown(label)}")
        if names is not None and isinstance(label, int):
            label = names[label] if 0 <= label < len(names) else "unlabelled"
        if not text.strip():
            self.skipped["empty"] += 1
            return
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: the text holds half a surrogate pair at character {error.start}") from error
        yield Document(text.replace("\r\n", "\n").replace("\r", "\n"), str(label), where)


class JsonlSource(_Records):
    """One JSON object a line. A blank line is nothing; any other line that is no record is an error."""

    def __init__(self, path: Path, text: str, domain: str | None) -> None:
        super().__init__(text, domain, path.stem)
        self.path = path

    def __iter__(self) -> Iterator[Row]:
        self.skipped.clear()
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    for document in self._line(line, f"{self.path}, line {number}"):
                        yield document, None
        except OSError as error:
            _unreadable(error)

    def _line(self, line: bytes, where: str) -> Iterator[Document]:
        if not line.strip():
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: a record must be a JSON object, got {_shown(record)}")
        yield from self.document(record, where)


class ParquetSource(_Records):
    """Rows of a Parquet file, streamed; only the columns asked for are read."""

    def __init__(self, path: Path, text: str, domain: str | None) -> None:
        super().__init__(text, domain, path.stem)
        self.path = path

    def __iter__(self) -> Iterator[Row]:
        self.skipped.clear()
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                names = file.schema_arrow.names
                columns = [c for c in (self.text, self.domain or "domain") if c in names]
                row = 0
                for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
                    for record in batch.to_pylist():
                        row += 1
                        for document in self.document(record, f"{self.path}, row {row}"):
                            yield document, None
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"cannot read {self.path} as Parquet: {error}") from error


class DatasetsSource(_Records):
    """A ``datasets`` object, recognised by what it can do; the package itself is never imported here.

    A dictionary's keys are the splits (train, valid or validation, test); with train alone, contents decide.
    """

    def __init__(self, dataset: Any, text: str, domain: str | None) -> None:
        super().__init__(text, domain, "text")
        self.parts: dict[str, Any] = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
        unknown = self.parts.keys() - _SPLIT_NAMES.keys()
        if unknown:
            raise DataError(
                f"no split can be named {', '.join(sorted(map(repr, unknown)))}; pass one of them alone, "
                "or a DatasetDict with train, validation and test"
            )
        for part in self.parts.values():
            if not (hasattr(part, "iter") and hasattr(part, "features")):
                raise DataError(f"a corpus cannot be made of {type(part).__name__}; see open_corpus for what it can")

    def __iter__(self) -> Iterator[Row]:
        self.skipped.clear()
        for name, part in self.parts.items():
            split = _SPLIT_NAMES[name] if len(self.parts) > 1 else None
            for document in self._rows(name, part):
                yield document, split

    def _rows(self, name: str, part: Any) -> Iterator[Document]:
        features = part.features or {}  # unknown for some streams
        wanted = [field for field in (self.text, self.domain or "domain") if field in features]
        names = getattr(features.get(self.domain or "domain"), "names", None)
        row = 0
        for batch in (part.select_columns(wanted) if wanted else part).iter(batch_size=_BATCH):
            for values in zip(*batch.values(), strict=True):
                row += 1
                yield from self.document(dict(zip(batch, values, strict=True)), f"{name}, row {row}", names)


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"cannot read {error.filename}: {error.strerror}") from error


def _shown(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
