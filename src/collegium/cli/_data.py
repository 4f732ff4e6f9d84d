"""What the verbs that read a corpus share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collegium.data.corpus import Corpus
    from collegium.data.document import Split

__all__ = ["open_data", "open_split"]


def open_split(name: str | None) -> Split | None:
    """The split of this name; None is None. Raises ConfigError for any other."""
    from collegium.data.document import SPLITS
    from collegium.errors import ConfigError

    if name not in (None, *SPLITS):
        raise ConfigError(f"no split is named {name!r}; the splits are {', '.join(SPLITS)}")
    return next((split for split in SPLITS if split == name), None)


def open_data(data: str) -> Corpus:
    """A corpus, or one text file as a corpus of one document. Raises DataError."""
    from collegium.data.corpus import Corpus, Document, open_corpus
    from collegium.errors import DataError

    path = Path(data)
    if not path.is_file() or path.suffix.lower() in (".jsonl", ".ndjson", ".parquet"):
        return open_corpus(data)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a text file in UTF-8: {error}") from error
    return Corpus(str(path), [(Document(text, path.stem, path.name), None)] if text.strip() else [])
