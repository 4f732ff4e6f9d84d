"""What a run writes about itself: one JSON object a line, and optional experiment trackers behind one protocol.

Every line has ``event`` ("step" or "eval"), ``step`` and ``tokens``. A "step" line has ``loss`` (nats per token),
``lr``, ``grad_norm``, ``tokens_per_second``, ``seconds``, what the objective has beside the loss, each balance loss by
name, and for MoE models ``max_violation`` (mean over layers), ``dead_experts`` (sum over layers), ``entropy`` (of the
load, in bits, mean over layers) and ``loads``: a list for each MoE layer in order, with each expert's share of the
layer's assignments in this step, rounded to 4 digits (they sum to 1 but for rounding; all 0 if the step had no tokens).
An "eval" line has ``bits_per_byte`` of all text and ``domains`` with each domain's.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import polars as pl

from collegium.errors import ConfigError, StorageError

__all__ = ["Logger", "MetricsFile", "open_logger", "read_metrics"]


class Logger(Protocol):
    """Anything that takes numbers as they come."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the numbers of one step."""

    def close(self) -> None:
        """No more will come."""


class MetricsFile:
    """``metrics.jsonl``: appended line by line, each line written whole, so that it can be followed while it grows.

    Args:
        path: the file.
        keep: bytes to keep of what is there; a resumed run passes what its checkpoint recorded, so that the lines
            of steps that are run again do not appear twice.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
            if self._file.tell() < keep:
                raise StorageError(
                    f"{path} holds {self._file.tell()} bytes, the checkpoint to resume from recorded {keep}: it was "
                    "changed since; put it back, or start afresh"
                )
            self._file.truncate(keep)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error}") from error

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. Raises StorageError if it cannot be written."""
        try:
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error}") from error

    def sync(self) -> int:
        """Flush to the disk; the file's size in bytes."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> pl.DataFrame:
    """The metrics file as a table; what a line does not have is null."""
    return pl.read_ndjson(path, infer_schema_length=None)


class _TensorBoard:
    def __init__(self, out: Path, recipe: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(out / "tensorboard"))
        self._writer.add_text("recipe", f"```json\n{json.dumps(recipe, indent=2)}\n```")

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, out: Path, recipe: dict[str, Any]) -> None:
        import trackio

        self._trackio: Any = trackio
        # it prints greetings, and standard output may be our JSON
        with contextlib.redirect_stdout(sys.stderr):
            trackio.init(project="collegium", name=out.resolve().name, config=recipe)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._trackio.log(values, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.finish()


def open_logger(name: str, out: Path, recipe: dict[str, Any]) -> Logger:
    """The tracker "tensorboard" or "trackio". Raises ConfigError if it is not installed."""
    try:
        return _TensorBoard(out, recipe) if name == "tensorboard" else _Trackio(out, recipe)
    except ImportError as error:
        raise ConfigError(f"run.loggers names {name}, which is not installed: pip install 'collegium[log]'") from error
