"""What a person sees of a run: one live line on a terminal, plain lines elsewhere. All of it goes to standard error."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["ProgressLine"]


class ProgressLine:
    """Shows a run's numbers; a context manager.

    Args:
        steps: of the whole run.
        done: steps that were done before.
        quiet: show nothing, as all processes but the first do.
        console: where to; standard error by default.
    """

    def __init__(self, steps: int, done: int = 0, *, quiet: bool = False, console: Console | None = None) -> None:
        self.steps, self.done, self.quiet = steps, done, quiet
        self.console = console or Console(stderr=True, soft_wrap=True)
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._started, self._before = time.monotonic(), done

    def __enter__(self) -> ProgressLine:
        if self.console.is_terminal and not self.quiet:
            columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._live = Progress(*columns, console=self.console)
            self._task = self._live.add_task("", total=self.steps, completed=self.done)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        self.done = step
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def show(self, line: dict[str, Any]) -> None:
        """The numbers of a "step" line of the metrics file."""
        if self.quiet:
            return
        text = f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s"
        if "max_violation" in line:
            text += f"  MaxVio {line['max_violation']:.2f}  dead {line['dead_experts']}"
        if self._live is not None:
            self._live.update(self._task, description=text)
            return
        ran = self.done - self._before
        left = (time.monotonic() - self._started) / ran * (self.steps - self.done) if ran else 0.0
        self.say(f"step {line['step']}/{self.steps}  {text}  {_clock(left)} left")

    def say(self, text: str) -> None:
        """One line of its own."""
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
