"""`Journal`: where a run's numbers go: the metrics file, the trackers, and the line a person watches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from collegium.train.evaluate import Evaluation
from collegium.train.metrics import Logger, MetricsFile, open_logger
from collegium.train.progress import ProgressLine
from collegium.train.recipe import Recipe
from collegium.train.state import Progress

__all__ = ["Journal"]


class Journal:
    """A context manager; silent in all processes but the first.

    Args:
        recipe: names the trackers and the length of the run.
        out: the run's folder.
        done: how far an earlier part of the run came.
        active: whether this process writes.
    """

    def __init__(self, recipe: Recipe, out: Path, done: Progress, *, active: bool) -> None:
        self.recipe, self.out, self.done, self.active = recipe, out, done, active
        self.line = ProgressLine(recipe.steps, done.step, quiet=not active)
        self.metrics: MetricsFile | None = None
        self.loggers: list[Logger] = []
        self._started = time.monotonic() - done.seconds
        self._busy, self._tokens = 0.0, 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Journal:
        with contextlib.ExitStack() as stack:
            if self.active:
                self.metrics = MetricsFile(self.out / "metrics.jsonl", self.done.metrics_bytes)
                stack.enter_context(self.metrics)
                for name in self.recipe.run.loggers:
                    self.loggers.append(open_logger(name, self.out, self.recipe.plain()))
                    stack.callback(self.loggers[-1].close)
            stack.enter_context(self.line)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run so far, those before a resume included."""
        return time.monotonic() - self._started

    @contextlib.contextmanager
    def stepping(self, tokens: int) -> Iterator[None]:
        """Time one optimizer step of so many tokens; evaluations and checkpoints are not in the tokens per second."""
        began = time.perf_counter()
        yield
        self._busy += time.perf_counter() - began
        self._tokens += tokens

    def step(self, at: Progress, values: dict[str, Any]) -> None:
        """The numbers of one step, `values` as `collegium.train.metrics` lists them; trackers get numbers only."""
        values = {**values, "tokens_per_second": self._tokens / self._busy, "seconds": at.seconds}
        self._busy, self._tokens = 0.0, 0
        tracked = {f"train/{name}": value for name, value in values.items() if not isinstance(value, list)}
        self._write("step", at, values, tracked)
        self.line.show({"step": at.step, **values})

    def evaluation(self, at: Progress, found: Evaluation) -> None:
        """The result of an evaluation."""
        domains = found.bits_per_byte
        flat = {f"valid/{name}": value for name, value in domains.items()}
        line = {"loss": found.loss, "bits_per_byte": found.overall, "domains": domains}
        self._write("eval", at, line, {"valid/bits_per_byte": found.overall, **flat})
        shown = "  ".join(f"{name} {value:.3f}" for name, value in domains.items())
        self.line.say(f"step {at.step}: {found.overall:.4f} bits per byte ({shown})")

    def _write(self, event: str, at: Progress, line: dict[str, Any], tracked: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.write({"event": event, "step": at.step, "tokens": at.tokens, **line})
        for logger in self.loggers:
            logger.log(at.step, tracked)

    def sync(self) -> int:
        """Flush the metrics file; its size in bytes."""
        return 0 if self.metrics is None else self.metrics.sync()
