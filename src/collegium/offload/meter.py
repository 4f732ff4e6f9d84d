"""`Meter`: how long an engine's passes took, so that the simulator can speak of this machine and this model.

Times that a pass stood still for reads are left out: those are what the simulator is to find.

Legend: n distinct experts of a layer.
"""

from __future__ import annotations

import time
from collections import defaultdict

from collegium.errors import ConfigError
from collegium.offload.cost import CostModel

__all__ = ["Meter"]


class Meter:
    """Adds up the parts of passes: experts, the rest of the layers, and what lies between two passes."""

    def __init__(self) -> None:
        self._mark: float | None = None  # when the part that runs now began
        self._single = False
        self._layers = self._passes = 0
        self._layer_seconds = self._outside_seconds = 0.0
        self._rows: dict[tuple[int, bool], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def begin(self, tokens: int) -> None:
        """A pass of so many tokens starts."""
        now = time.perf_counter()
        if self._single and tokens == 1 and self._mark is not None:
            self._outside_seconds += now - self._mark
            self._passes += 1
        self._mark, self._single = now, tokens == 1

    def experts(self, bits: int, count: int, rows: int, seconds: float) -> None:
        """So many experts of a copy were computed, for so many rows in all."""
        found = self._rows[bits, self._single]
        found[0] += count
        found[1] += rows
        found[2] += seconds

    def layer(self, apart: float) -> None:
        """A layer's experts are done; `apart` seconds since the last call went into experts and waiting."""
        now = time.perf_counter()
        if self._single and self._mark is not None:
            self._layer_seconds += now - self._mark - apart
            self._layers += 1
        self._mark = now

    def cost(self, disk: CostModel) -> CostModel:
        """The times of this model, with the reads of `disk` (see `measure_cost`).

        Raises:
            ConfigError: no text was written yet, so nothing was measured.
        """
        if not self._passes or not self._layers:
            raise ConfigError("nothing was measured: let the model write at least two tokens first")
        points: dict[int, tuple[tuple[float, float], ...]] = {}
        for bits in sorted({bits for bits, _ in self._rows}):
            found = sorted(
                (rows / count, seconds / count)
                for (of, _), (count, rows, seconds) in self._rows.items()
                if of == bits and count
            )
            points[bits] = tuple(found if len(found) < 2 or found[0][0] < found[1][0] else found[:1])
        return disk.model_copy(
            update={
                "expert": points,
                "layer_seconds": self._layer_seconds / self._layers,
                "outside_seconds": self._outside_seconds / self._passes,
                "measured": f"{disk.measured}; {self._passes} tokens written one by one",
            }
        )
