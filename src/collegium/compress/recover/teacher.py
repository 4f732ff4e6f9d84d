"""`TeacherStore`: what the original model predicts for the training text, kept on disk.

The teacher runs once, before the student is loaded; the two are never in memory together, and several students of one
teacher can learn from one store. It is a folder:

    store.json                          `About`: of which teacher, on which text
    part-<number>-<crc32>.safetensors   some sequences, complete; the name holds the checksum of the file
        sequence     [n]            int64     numbers of the sequences, in the packed text
        ids          [n, S-1, C]    uint16 (int32 from 65,536 tokens of vocabulary on), the likeliest tokens
        logp         [n, S-1, C]    float16   their log-probabilities
        rest         [n, S-1]       float32   probability of all other tokens together

Parts appear as a whole, so a kill loses the part at work; what is missing is filled in by the next run. Reading maps
the files into memory. Nothing in them is trusted: checksum, shapes and values are checked on opening.

Legend: B sequences of a batch, n sequences of a part, S positions, V vocabulary, C candidates.
"""

from __future__ import annotations

import mmap
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import save
from torch import Tensor

from collegium.compress.recover.losses import Distiller, Targets
from collegium.data import Packed
from collegium.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from collegium.files import atomic_file, read_record
from collegium.layer import use_context
from collegium.models.checkpoint import read_header
from collegium.train.batches import model_inputs, routing_context

__all__ = ["CANDIDATES", "About", "TeacherStore"]

CANDIDATES = 64
"""C: how many of the teacher's probabilities are kept of each token."""
PART_BYTES = 4 << 20
"""About the size of a part: what a kill may lose, 16,000 tokens."""

_META = "store.json"
_NAME = re.compile(r"part-(\d{5,})-([0-9a-f]{8})\.safetensors")
_LOWEST = -1e4  # a log-probability that float16 holds and no distribution tells from 0
_TOLERANCE = 0.01  # of the sum of a distribution: float16 rounds each log-probability below 16 by less than 0.004

Array = np.ndarray[Any, np.dtype[Any]]


class About(BaseModel):
    """What a store is of; stores that differ in any of it cannot be mixed.

    Attributes:
        teacher, fingerprint: the model.
        dtype: what its weights were run in.
        corpus, tokenizer, split: fingerprints of the text; see `collegium.data.pack`.
        mask_documents: attention was confined to documents.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1] = 1
    teacher: str
    fingerprint: str
    dtype: str
    corpus: str
    tokenizer: str
    split: str
    sequence_length: int = Field(ge=2)
    mask_documents: bool
    vocab_size: int = Field(ge=2)
    candidates: int = Field(ge=1)


class TeacherStore:
    """The predictions of one teacher for sequences of one packed text.

    Args:
        folder: where they are, or will be.
        about: what they are of.

    Raises:
        ConfigError: the folder holds something else: no store, or one of another teacher or text.
        DataError: a file in it is damaged; it is named.
    """

    def __init__(self, folder: Path, about: About) -> None:
        self.folder, self.about = folder, about
        self._rows: dict[int, tuple[dict[str, Array], int]] = {}
        self._next = 0
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / _META).is_file())):
            raise ConfigError(f"{folder} exists and is no store of a teacher's predictions; choose another")
        if (folder / _META).is_file():
            _check_same(folder, about)
        else:
            with atomic_file(folder / _META) as partial:
                partial.write_text(about.model_dump_json(indent=1) + "\n", encoding="utf-8")
        for path in sorted(folder.glob("part-*")):
            self._add(path)

    def __len__(self) -> int:
        """How many sequences it holds."""
        return len(self._rows)

    def missing(self, sequences: Iterable[int]) -> list[int]:
        """Those of `sequences` that are not there, each once, in their order."""
        return [one for one in dict.fromkeys(sequences) if one not in self._rows]

    def fill(
        self,
        load: Callable[[], Any],
        packed: Packed,
        sequences: Sequence[int],
        *,
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Run the teacher over those of `sequences` that are missing.

        Args:
            load: gives the teacher; called only if something is missing.
            packed: the text.
            batch_size: sequences in a forward.
            progress: called with the number of sequences just stored.

        Raises:
            ConfigError: the teacher has another vocabulary than `about` says.
            NonFiniteError: it predicts NaN.
            StorageError: a part could not be written; those before it stay.
        """
        missing = self.missing(sequences)
        if not missing:
            return
        model = load()
        distiller = Distiller(model)
        size = max(1, PART_BYTES // (4 * self.about.candidates * (self.about.sequence_length - 1)))
        for first in range(0, len(missing), size):
            numbers = missing[first : first + size]
            batches = [numbers[at : at + batch_size] for at in range(0, len(numbers), batch_size)]
            found = [self._predict(distiller, packed, batch) for batch in batches]
            arrays = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
            self._write({"sequence": np.asarray(numbers, np.int64), **arrays})
            if progress is not None:
                progress(len(numbers))

    def targets(self, sequences: Iterable[int]) -> Targets:
        """What the teacher predicts for these sequences, one after the other: N = (S - 1) rows of each."""
        rows = [self._rows[int(one)] for one in sequences]
        ids, logp, rest = (np.concatenate([part[name][row] for part, row in rows]) for name in ("ids", "logp", "rest"))
        probability = torch.from_numpy(logp.astype(np.float32)).exp_()
        others = torch.from_numpy(rest)
        total = probability.sum(1) + others
        return Targets(torch.from_numpy(ids.astype(np.int64)), probability / total[:, None], others / total)

    def _predict(self, distiller: Distiller, packed: Packed, numbers: Sequence[int]) -> dict[str, Array]:
        """``ids [B, S-1, C]``, ``logp`` alike and ``rest [B, S-1]`` of one batch."""
        model = distiller.model
        head = model.get_output_embeddings()
        if head is not None and head.weight.shape[0] != self.about.vocab_size:
            raise ConfigError(
                f"{self.about.teacher} predicts {head.weight.shape[0]} tokens; its config says {self.about.vocab_size}"
            )
        batch = {name: tensor.to(model.device) for name, tensor in packed.batch(numbers).items()}
        with torch.no_grad(), use_context(model, routing_context(batch)):
            found = distiller.targets(model_inputs(batch, model, self.about.mask_documents), self.about.candidates)
        if not bool(found.rest.isfinite().all()):
            raise NonFiniteError(
                f"{self.about.teacher} predicts NaN in one of the sequences {numbers[0]} to {numbers[-1]} of the text; "
                "run it in float32"
            )
        shape = (len(numbers), self.about.sequence_length - 1)
        return {
            "ids": _numpy(found.ids, self._dtypes["ids"]).reshape(*shape, -1),
            "logp": _numpy(found.probability.log().clamp(min=_LOWEST), np.float16).reshape(*shape, -1),
            "rest": _numpy(found.rest, np.float32).reshape(shape),
        }

    @property
    def _dtypes(self) -> dict[str, Any]:
        ids = np.uint16 if self.about.vocab_size <= 1 << 16 else np.int32
        return {"sequence": np.int64, "ids": ids, "logp": np.float16, "rest": np.float32}

    def _write(self, arrays: dict[str, Array]) -> None:
        content = save(arrays)
        path = self.folder / f"part-{self._next:05d}-{zlib.crc32(content):08x}.safetensors"
        with atomic_file(path) as partial:
            partial.write_bytes(content)
        self._add(path)

    def _add(self, path: Path) -> None:
        """Take a part in."""
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise DataError(f"{path} is not named like a part of a teacher's predictions; move it away")
        arrays = self._map(path, match[2])
        self._check_values(path, arrays)
        for row, number in enumerate(arrays["sequence"].tolist()):
            self._rows[number] = (arrays, row)
        self._next = max(self._next, int(match[1]) + 1)

    def _map(self, path: Path, checksum: str) -> dict[str, Array]:
        """The arrays of a part, in memory-mapped form, in the dtypes and shapes they must have."""
        damaged = f"{path} is damaged; delete it, and the same command runs the teacher over its sequences again"
        try:
            with open(path, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise DataError(f"{damaged} ({error})") from error
        found = f"{zlib.crc32(content):08x}"
        if found != checksum:
            raise DataError(f"{damaged} (its checksum is {found}, not {checksum})")
        try:
            header = read_header(path)
        except CheckpointError as error:
            raise DataError(f"{damaged} ({error})") from error
        S, C = self.about.sequence_length, self.about.candidates
        n = header["sequence"].shape[0] if "sequence" in header and header["sequence"].shape else 0
        shapes = {"sequence": (n,), "ids": (n, S - 1, C), "logp": (n, S - 1, C), "rest": (n, S - 1)}
        names = {np.uint16: "U16", np.int32: "I32", np.int64: "I64", np.float16: "F16", np.float32: "F32"}
        wanted = {name: (names[self._dtypes[name]], shape) for name, shape in shapes.items()}
        if {name: (info.dtype, info.shape) for name, info in header.items()} != wanted:
            raise DataError(f"{damaged} (its tensors are not those of {n} sequences of {S} tokens)")
        return {
            name: np.frombuffer(content, self._dtypes[name], count=info.numel, offset=info.offset).reshape(info.shape)
            for name, info in header.items()
        }

    def _check_values(self, path: Path, arrays: dict[str, Array]) -> None:
        numbers, ids, logp, rest = (arrays[name] for name in ("sequence", "ids", "logp", "rest"))
        if (numbers < 0).any() or len(np.unique(numbers)) != len(numbers):
            raise DataError(f"{path}: field 'sequence' repeats a number, or has one below 0")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.about.vocab_size:
            raise DataError(f"{path}: field 'ids' names token {ids.max()}; there are {self.about.vocab_size}")
        with np.errstate(invalid="ignore", over="ignore"):
            total = np.exp(logp.astype(np.float32)).sum(-1) + rest
            bad = ~(np.abs(total - 1) < _TOLERANCE) | ~(rest >= 0)
        if bad.any():
            raise DataError(f"{path}: fields 'logp' and 'rest' are no probabilities in {int(bad.sum())} places")


def _numpy(tensor: Tensor, dtype: Any) -> Array:
    return tensor.cpu().numpy().astype(dtype)


def _check_same(folder: Path, about: About) -> None:
    stored = read_record(folder / _META, About, what="teacher's record", limit=1 << 20, error=DataError)
    # a folder that has moved is the same teacher
    mine, theirs = (one.model_dump(exclude={"teacher"}) for one in (about, stored))
    different = [f"{name} {theirs[name]!r}, not {mine[name]!r}" for name in mine if mine[name] != theirs[name]]
    if different:
        raise ConfigError(
            f"{folder} holds predictions of another teacher or for other text ({'; '.join(different)}); choose another "
            "folder, or delete it"
        )
