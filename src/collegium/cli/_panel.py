"""How text is shown while it comes: on the terminal as it is, or under a live panel of the cache."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from collegium.offload.engine import AHEAD, DISK

if TYPE_CHECKING:
    from collegium.offload.model import Offloaded

__all__ = ["Shown"]

_RECENT = 0.9  # what the panel keeps of a layer's shares from one pass to the next
_WIDTH = 32


class Shown(TextStreamer):
    """A streamer for ``generate``, and a context while it runs.

    Attributes:
        first: when the first token came.
    """

    def __init__(self, found: Offloaded, tokenizer: Any, *, watch: bool, quiet: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first = time.perf_counter()
        self._found, self._quiet = found, quiet
        self._text, self._tokens = "", 0
        self._shares = {layer: np.zeros(3) for layer in found.engine.geometry.layers}
        self._live: Live | None = None
        if watch:
            self._live = Live(get_renderable=self._panel, console=Console(), refresh_per_second=8)
        self._end: Any = None

    def __enter__(self) -> Shown:
        if self._live is not None:
            self._end = self._found.watch(self._see)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._end()

    def put(self, value: Any) -> None:
        """The prompt, then a token at a time."""
        if self.next_tokens_are_prompt:
            self.first = time.perf_counter()
        else:
            self._tokens += 1
            if self._tokens == 1:
                self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Some words are complete."""
        self._text += text
        if self._live is None and not self._quiet:
            print(text, end="\n" if stream_end else "", flush=True)  # noqa: T201

    def _see(self, layer: int, experts: Any, weights: Any, source: Any) -> None:
        now = np.bincount(source.reshape(-1), minlength=3) / source.size
        self._shares[layer] = _RECENT * self._shares[layer] + (1 - _RECENT) * now

    def _panel(self) -> Group:
        seconds = time.perf_counter() - self.first
        rate = f"{(self._tokens - 1) / seconds:.1f} tokens/s" if self._tokens > 1 else ""
        table = Table(box=None, pad_edge=False, title=rate, title_justify="left")
        for column in ("layer", "where its experts were, lately", "memory", "ahead", "disk"):
            table.add_column(column, justify="left" if "where" in column else "right")
        for layer, shares in self._shares.items():
            share = shares / max(shares.sum(), 1e-9)
            bar = Text()
            for part, colour in zip(share, ("blue", "green", "red"), strict=True):
                bar.append("█" * round(part * _WIDTH), style=colour)
            table.add_row(str(layer), bar, f"{share[0]:.0%}", f"{share[AHEAD]:.0%}", f"{share[DISK]:.0%}")
        return Group(Text(self._text), Text(""), table)
