"""Learning-rate schedules: ``factor = schedule(step, steps)``, what ``optim.lr`` is multiplied by in a step.

Steps count from 0; the first step of a warm-up of n steps has factor 1/n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from collegium.catalog import get, method
from collegium.train.recipe import ScheduleSpec

__all__ = ["WSD", "Cosine", "Schedule", "build_schedule"]


@dataclass(frozen=True)
class Schedule:
    """Common settings: `warmup` is a fraction of the run, `final` the last factor."""

    warmup: float = 0.02
    final: float = 0.1

    def __call__(self, step: int, steps: int) -> float:
        """The factor of step `step` (from 0) in a run of `steps`."""
        rising = round(self.warmup * steps)
        if step < rising:
            return (step + 1) / rising
        return self.after_warmup(step - rising, steps - rising, steps)

    def after_warmup(self, step: int, left: int, steps: int) -> float:
        """The factor of the step-th of `left` steps after the warm-up; `steps` is the whole run."""
        raise NotImplementedError


@method("cosine", kind="schedule", paper="SGDR (2017)", arxiv="1608.03983")
@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from 1 to `final`."""

    def after_warmup(self, step: int, left: int, steps: int) -> float:
        progress = step / max(left - 1, 1)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


@method("wsd", kind="schedule", paper="Scaling laws beyond fixed training durations (2024)", arxiv="2405.18392")
@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay: constant, then falls as one minus a square root over the last `decay` of the run.

    The three phases are MiniCPM's (2024); the square-root cooldown is Hägele et al.'s (2024).
    """

    decay: float = 0.2

    def after_warmup(self, step: int, left: int, steps: int) -> float:
        falling = min(round(self.decay * steps), left)
        into = step - (left - falling) + 1
        if into <= 0:
            return 1.0
        return 1 - (1 - self.final) * math.sqrt(into / falling)


def build_schedule(spec: ScheduleSpec) -> Schedule:
    """The schedule a recipe names. Raises ConfigError for a name that is not of kind "schedule"."""
    kind = get("schedule", spec.name)
    settings = spec.model_dump(include=set(kind.__dataclass_fields__))
    return kind(**settings)
