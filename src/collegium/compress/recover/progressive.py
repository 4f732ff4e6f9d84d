"""Shrinking in stages, with a recovery after each: what is lost at once is harder to regain (SlimQwen, 2026, arXiv
2605.08738, which takes two stages, half of the reduction first, and finds no use in more)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from collegium.errors import ConfigError

__all__ = ["Recover", "Shrink", "Stage", "shrink_in_stages", "stages"]

Shrink = Callable[[Path, float, Path], object]
"""``shrink(model, share of its experts to keep, out)`` writes the smaller model to `out`."""
Recover = Callable[[Path, int, Path], Path]
"""``recover(model, tokens, out)`` gives the folder to go on with: `out`, or `model` if training did not help."""


@dataclass(frozen=True)
class Stage:
    """One stage: the share of the first model's experts it leaves, its tokens, and the two models it gave."""

    keep: float
    tokens: int
    shrunk: Path
    recovered: Path


def stages(keep: float, count: int = 2) -> list[float]:
    """The share of the experts that each stage leaves: equal steps from all to `keep`.

    Raises:
        ConfigError: `keep` is no share below 1, or there is no stage.
    """
    if not 0 < keep < 1 or count < 1:
        raise ConfigError(f"keep {keep} must be above 0 and below 1, and there must be at least one stage, not {count}")
    return [1 - (1 - keep) * number / count for number in range(1, count)] + [keep]


def shrink_in_stages(
    source: Path,
    keep: float,
    work: Path,
    *,
    shrink: Shrink,
    recover: Recover,
    tokens: int,
    count: int = 2,
    early: float = 0.1,
) -> list[Stage]:
    """Shrink and recover in turn; the model is the last stage's `recovered`.

    A folder that is there is taken as it is, as both callables are to write theirs as a whole: the same call goes on
    after an interruption.

    Args:
        source: a model folder.
        keep: share of its experts to keep in the end.
        work: folder for the models of all stages: ``stage-<n>`` and ``stage-<n>-recovered``.
        tokens: to recover on, in all stages together.
        count: of stages.
        early: share of the tokens that all stages but the last have together; the paper's 40 of 400 billion.

    Raises:
        ConfigError: a setting is out of range.
    """
    if not 0 < early < 1 or tokens < count:
        raise ConfigError(f"early {early} must be a share, and {tokens} tokens must be enough for {count} stages")
    shares = stages(keep, count)
    before = [max(1, round(tokens * early / (count - 1)))] * (count - 1) if count > 1 else []
    found: list[Stage] = []
    model, left = source, 1.0
    for number, (share, budget) in enumerate(zip(shares, [*before, tokens - sum(before)], strict=True), 1):
        shrunk, recovered = work / f"stage-{number}", work / f"stage-{number}-recovered"
        if not shrunk.exists():
            shrink(model, share / left, shrunk)
        model = recovered if recovered.exists() else recover(shrunk, budget, recovered)
        found.append(Stage(share, budget, shrunk, model))
        left = share
    return found
