"""`Meter`: what an engine tells of its passes to whoever takes their times; see `collegium.offload.simulate_times`."""

from __future__ import annotations

__all__ = ["Meter"]


class Meter:
    """Takes no times."""

    def begin(self, tokens: int) -> None:
        """A pass of so many tokens starts."""

    def experts(self, bits: int, count: int, rows: int, seconds: float) -> None:
        """So many experts of a copy were computed, for so many rows in all."""

    def layer(self) -> None:
        """A layer's experts are done."""
