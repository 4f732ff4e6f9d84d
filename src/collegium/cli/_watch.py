"""What `collegium watch` shows: frames from a training run or a trace that grows, and how they are drawn.

A shade says the load of an expert relative to an even share, from blue (idle) over grey (even) to orange (crowded): a
scale that is told apart with any colour vision. The density of the character says the same without colour.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from collegium.errors import ConfigError, DataError
from collegium.trace.schema import PHASES

__all__ = ["Frame", "Source", "draw", "is_run", "open_source"]

HISTORY = 240
"""Points of a history that are kept."""
WINDOW = 1024
"""Tokens, at the least, that numbers of a trace are of: of a few tokens most experts would seem dead."""

_SPARKS = "▁▂▃▄▅▆▇█"
_LEVELS = (
    (0.0, "×", "bold #2c5aa0", "none"),
    (0.25, "·", "#2c5aa0", "< 1/4"),
    (0.5, "░", "#6f9bd1", "< 1/2"),
    (2.0, "▒", "#9a9a9a", "even"),
    (4.0, "▓", "#f0a04b", "> 2"),
    (math.inf, "█", "#d95f02", "> 4"),
)
"""Load relative to an even share up to which a shade stands (the first: exactly 0), its character, style and name."""


@dataclass
class Frame:
    """One moment of a run.

    Attributes:
        kind: "training" or "trace".
        state: "running", or "complete".
        progress: how far it is, in words.
        layers: name of each row of `loads`.
        loads: for each MoE layer the share of each expert.
        now: number -> its latest value.
        history: number -> its values, oldest first.
    """

    kind: str
    state: str
    progress: str
    layers: list[int] = field(default_factory=list)
    loads: list[list[float]] = field(default_factory=list)
    now: dict[str, float] = field(default_factory=dict)
    history: dict[str, list[float]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The frame as plain data, for ``--json``."""
        return asdict(self)

    def add(self, values: dict[str, float]) -> None:
        """Append to the histories."""
        for name, value in values.items():
            self.now[name] = value
            self.history[name] = [*self.history.get(name, []), value][-HISTORY:]


class Source(Protocol):
    """Something to watch."""

    def poll(self) -> Frame:
        """What is there by now."""


def is_run(folder: Path) -> bool:
    """Whether there is something to watch yet."""
    return any((folder / name).is_file() for name in ("metrics.jsonl", "meta.json"))


def open_source(folder: Path) -> Source:
    """The source for a run's folder.

    Raises:
        ConfigError: it holds neither a training run nor a trace.
    """
    if (folder / "metrics.jsonl").is_file():
        return _Training(folder)
    if (folder / "meta.json").is_file():
        return _Tracing(folder)
    what = "does not exist" if not folder.exists() else "holds neither metrics.jsonl (training) nor meta.json (trace)"
    raise ConfigError(f"{folder} {what}; start the run first, or wait for it with --wait")


class _Training:
    """Follows ``metrics.jsonl``, reading only what is new."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.offset = 0
        self.steps: int | None = None
        self.frame = Frame("training", "running", "no step yet")

    def poll(self) -> Frame:
        # asked before reading, so that lines written in between are not missed at the end
        complete = (self.folder / "summary.json").is_file()
        try:
            size = self.path.stat().st_size
            if size < self.offset:  # a resumed run has cut it back to its checkpoint
                self.offset, self.frame = 0, Frame("training", "running", "no step yet")
            with open(self.path, "rb") as handle:
                handle.seek(self.offset)
                fresh = handle.read(size - self.offset)
        except OSError as error:
            raise DataError(f"{self.path} is not readable: {error}") from error
        whole = fresh[: fresh.rfind(b"\n") + 1]  # the last line may be half written
        self.offset += len(whole)
        for line in whole.splitlines():
            self._take(line)
        self.frame.state = "complete" if complete else "running"
        return self.frame

    def _take(self, line: bytes) -> None:
        try:
            values = json.loads(line)
            event = values["event"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path} holds a line that is none of a training run: {line[:80]!r}") from error
        if event != "step":
            return
        if self.steps is None:
            self.steps = _planned_steps(self.folder)
        total = f" of {self.steps:,}" if self.steps else ""
        self.frame.progress = f"step {values['step']:,}{total}, {values['tokens']:,} tokens"
        shown = {
            "loss": "loss",
            "tokens/s": "tokens_per_second",
            "MaxVio": "max_violation",
            "entropy, bits": "entropy",
            "dead experts": "dead_experts",
        }
        self.frame.add({name: float(values[key]) for name, key in shown.items() if key in values})
        if "loads" in values:
            self.frame.loads = values["loads"]
            self.frame.layers = list(range(len(self.frame.loads)))


def _planned_steps(folder: Path) -> int | None:
    import yaml

    try:
        return int(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["run"]["steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None  # the view does without


class _Tracing:
    """Follows the parts of a trace, reading each once.

    Its numbers are of the latest parts that hold `WINDOW` tokens together; the loads also of all parts that came since
    the last look.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._begin()

    def _begin(self) -> None:
        self.read = self.tokens = 0
        self.last: float | None = None  # when the latest part was written
        self.window: deque[tuple[int, Any]] = deque()  # (tokens, counts [L, E]) of the latest parts
        self.held, self.sum = 0, np.zeros((), np.int64)  # of the window
        self.phases = np.zeros(len(PHASES), np.int64)
        self.frame = Frame("trace", "running", "no part yet")

    def poll(self) -> Frame:
        from collegium.trace import Trace

        trace = Trace.open(self.folder)
        if len(trace.files) < self.read:  # recorded anew
            self._begin()
        meta = trace.meta.model_copy(update={"complete": False, "tokens": None, "parts": None})
        sizes = [entry.num_experts for entry in meta.layers]
        shown: Any = None
        for file in trace.files[self.read :]:
            part = Trace(self.folder, meta, [file], verify=True)
            counts, written = part.counts(), file.stat().st_mtime
            latest = self._latest(len(part), counts)
            values = _balance(latest, sizes)
            # a rate needs the part before; parts of one moment have none
            if self.last is not None and written > self.last:
                values = {"tokens/s": len(part) / (written - self.last), **values}
            self.frame.add(values)
            self.read, self.tokens, self.last = self.read + 1, self.tokens + len(part), written
            self.phases += np.bincount(part.column("phase"), minlength=len(PHASES))
            shown = latest if shown is None else shown + counts
        if shown is not None:
            self.frame.layers = trace.layers
            self.frame.loads = [
                (row[:E] / max(row[:E].sum(), 1)).round(4).tolist() for row, E in zip(shown, sizes, strict=True)
            ]
        if self.read:
            self.frame.progress = f"{self.tokens:,} tokens in {self.read} parts{self._phases()}"
        self.frame.state = "complete" if trace.meta.complete else "running"
        return self.frame

    def _latest(self, tokens: int, counts: Any) -> Any:
        """``[L, E]`` counts of the latest parts, this one included, that hold `WINDOW` tokens."""
        self.window.append((tokens, counts))
        self.held, self.sum = self.held + tokens, self.sum + counts
        while self.held - self.window[0][0] >= WINDOW:
            gone, found = self.window.popleft()
            self.held, self.sum = self.held - gone, self.sum - found
        return self.sum

    def _phases(self) -> str:
        """Tokens by phase, where there are several."""
        named = [f"{count:,} {name}" for name, count in zip(PHASES, self.phases.tolist(), strict=True) if count]
        return f" ({', '.join(named)})" if len(named) > 1 else ""


def _balance(counts: Any, sizes: Sequence[int]) -> dict[str, float]:
    """Mean MaxVio and entropy over layers, and all dead experts, of ``counts [L, E]``."""
    violation, entropy, dead = [], [], 0
    for row, E in zip(counts, sizes, strict=True):
        share = row[:E] / max(row[:E].sum(), 1)
        violation.append(float(share.max() * E - 1))
        entropy.append(float(-(share[share > 0] * np.log2(share[share > 0])).sum()))
        dead += int((row[:E] == 0).sum())
    return {
        "MaxVio": sum(violation) / len(violation),
        "entropy, bits": sum(entropy) / len(entropy),
        "dead experts": float(dead),
    }


def draw(frame: Frame, name: str, *, width: int, height: int | None = None) -> RenderableType:
    """A frame as text of at most `width` columns and, where `height` is given, about so many lines."""
    head = Text.assemble((name, "bold"), f"  {frame.kind}, {frame.state}: {frame.progress}", overflow="ellipsis")
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in ("left", "right", "left"):
        table.add_column(justify=column)
    room = max(8, width - 32)
    for title, value in frame.now.items():
        table.add_row(title, _number(value), Text(spark(frame.history[title][-room:]), style="#6f9bd1"))
    parts: list[RenderableType] = [head, table]
    if frame.loads:
        rows = None if height is None else max(1, height - len(frame.now) - 6)
        parts += ["", _heat(frame, width, rows), _legend()]
    return Group(*parts)


def spark(values: Sequence[float]) -> str:
    """A history as a line of bars, from its lowest to its highest value."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(_SPARKS) - 1
    return "".join(
        " " if not math.isfinite(value) else _SPARKS[round((value - low) / span * top) if span else top // 2]
        for value in values
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def _heat(frame: Frame, width: int, rows: int | None) -> RenderableType:
    """A line for each layer: its experts, the largest load, the dead ones."""
    shown = list(range(len(frame.loads)))
    if rows is not None and len(shown) > rows:
        shown.sort(key=lambda row: -_largest(frame.loads[row]))
        shown = sorted(shown[: max(1, rows - 1)])
    room = max(8, width - 28)
    most = max(len(frame.loads[row]) for row in shown)
    grouped, wide = -(-most // room), min(3, max(1, room // most))
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("experts" if grouped == 1 else f"experts, {grouped} a cell", no_wrap=True)
    table.add_column("max", justify="right")
    table.add_column("dead", justify="right")
    for row in shown:
        share = frame.loads[row]
        dead = sum(value == 0 for value in share)
        table.add_row(str(frame.layers[row]), _cells(share, grouped, wide), f"{_largest(share):.2f}", str(dead))
    if len(shown) < len(frame.loads):
        rest = len(frame.loads) - len(shown)
        return Group(table, Text(f"... and {rest} more layers with less imbalance", style="dim"))
    return table


def _largest(share: Sequence[float]) -> float:
    """The largest load relative to an even share."""
    return max(share) * len(share)


def _cells(share: Sequence[float], grouped: int, wide: int) -> Text:
    text = Text()
    E = len(share)
    for begin in range(0, E, grouped):
        cell = share[begin : begin + grouped]
        _, character, style, _ = _level(sum(cell) / len(cell) * E)
        text.append(character * wide, style)
    return text


def _level(relative: float) -> tuple[float, str, str, str]:
    if relative == 0:
        return _LEVELS[0]
    return next(level for level in _LEVELS[1:] if relative < level[0] or level[0] == math.inf)


def _legend() -> Text:
    text = Text("times an even share: ", style="dim")
    for _, character, style, title in _LEVELS:
        text.append(character, style)
        text.append(f" {title}  ", "dim")
    return text
