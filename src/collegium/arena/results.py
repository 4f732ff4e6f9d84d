"""`Results`: the numbers of all runs of an arena as one table, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import collegium
from collegium.arena.plan import ArenaPlan
from collegium.arena.rank import Ranking, swiss_rounds
from collegium.arena.run import run_folder
from collegium.arena.score import SCORE
from collegium.arena.speed import SPEED
from collegium.errors import ConfigError
from collegium.files import atomic_file

__all__ = ["LABELS", "SCALES", "Entry", "Results", "collect", "formatted"]

LABELS = {
    "bits_per_byte": "bits per byte",
    "max_violation": "MaxVio",
    "dead_experts": "dead experts",
    "specialisation": "I(domain; expert), bits",
    "active_experts": "active experts",
    "active_spread": "their deviation",
    "fluctuation": "routing changed",
    "flops_per_token": "MFLOP / token",
    "parameters": "M parameters",
    "tokens_per_second": "tokens/s",
    "peak_memory": "peak MB",
}
"""Number -> what it is called in tables."""

_FORMATS = {
    "bits_per_byte": ".4f", "max_violation": ".2f", "dead_experts": ".0%", "specialisation": ".3f",
    "active_experts": ".2f", "active_spread": ".2f", "fluctuation": ".1%", "flops_per_token": ",.3f",
    "parameters": ".2f", "tokens_per_second": ",.0f", "peak_memory": ",.0f",
}  # fmt: skip
SCALES = {"flops_per_token": 1e-6, "parameters": 1e-6, "peak_memory": 1e-6}


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        name: in the plan.
        systems: catalogued systems that its router names.
        causal: False where its routing looks at later tokens: its bits per byte are then no measure of prediction.
        numbers: name (see `LABELS`) -> value of each seed that is done.
        domains: bits per byte of each domain, one of each seed.
    """

    name: str
    systems: tuple[str, ...]
    causal: bool
    numbers: dict[str, tuple[float, ...]]
    domains: dict[str, tuple[float, ...]]

    def mean(self, number: str) -> float:
        """Over seeds; NaN where nothing was measured."""
        return float(np.mean(self.numbers[number])) if self.numbers.get(number) else float("nan")


@dataclass(frozen=True)
class Results:
    """What an arena has found so far. Attributes: the plan, `entries` in its order, `missing` runs, and torch's threads
    when speed was measured (0: it was not)."""

    plan: ArenaPlan
    entries: tuple[Entry, ...]
    missing: tuple[str, ...]
    threads: int = 0

    @property
    def ranked(self) -> list[Entry]:
        """Those that predict without looking ahead, the fewest mean bits per byte first."""
        return sorted((one for one in self.entries if one.causal), key=lambda one: one.mean("bits_per_byte"))

    def ranking(self) -> Ranking | None:
        """Of `ranked`, in its order, by tournaments over domains (mean bits per byte of seeds); None for fewer than two
        methods."""
        if len(self.ranked) < 2:
            return None
        return swiss_rounds(np.array([[-np.mean(values) for values in one.domains.values()] for one in self.ranked]))

    def record(self) -> dict[str, Any]:
        """As plain data, for ``arena.json``."""
        found = self.ranking()
        points = {} if found is None else {one.name: found.points[i] for i, one in enumerate(self.ranked)}
        slopes = {} if found is None else {one.name: found.slope[i] for i, one in enumerate(self.ranked)}
        return {
            "collegium": collegium.__version__,
            "plan": self.plan.model_dump(mode="json"),
            "labels": LABELS,
            "missing": list(self.missing),
            "threads": self.threads,
            "methods": [
                {
                    "name": one.name,
                    "systems": list(one.systems),
                    "causal": one.causal,
                    "numbers": {name: _summary(values) for name, values in one.numbers.items()},
                    "domains": {name: _summary(values) for name, values in one.domains.items()},
                    "swiss_points": points.get(one.name),
                    "swiss_slope": slopes.get(one.name),
                }
                for one in self.entries
            ],
        }

    def save(self, file: Path) -> None:
        """Write `record` as JSON. Raises StorageError."""
        with atomic_file(file) as partial:
            partial.write_text(json.dumps(self.record(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def collect(plan: ArenaPlan, out: str | Path) -> Results:
    """The numbers of the runs in `out` that are finished and measured.

    Raises:
        ConfigError: none is.
    """
    out = Path(out)
    speed = _speed(out / SPEED)
    speeds, threads = speed["tokens_per_second"], speed["threads"]
    entries, missing = [], []
    for name in plan.names:
        scores = []
        for seed in plan.seeds:
            file = run_folder(out, name, seed) / SCORE
            if file.is_file():
                scores.append(json.loads(file.read_text(encoding="utf-8")))
            else:
                missing.append(f"{name}, seed {seed}")
        if scores:
            entries.append(_entry(plan, name, scores, speeds))
    if not entries:
        raise ConfigError(f"{out} holds no measured run of this plan yet")
    return Results(plan, tuple(entries), tuple(missing), threads)


def _entry(plan: ArenaPlan, name: str, scores: list[dict[str, Any]], speeds: Mapping[str, float]) -> Entry:
    def of(section: str) -> dict[str, tuple[float, ...]]:
        return {key: tuple(float(one[section][key]) for one in scores) for key in scores[0][section]}

    numbers = of("numbers")
    if name in speeds:
        numbers["tokens_per_second"] = (speeds[name],)
    ordered = {key: numbers[key] for key in LABELS if key in numbers}
    return Entry(name, tuple(plan.systems(name)), scores[0]["causal"], ordered, of("domains"))


def _speed(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {"tokens_per_second": {}, "threads": 0}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _summary(values: tuple[float, ...]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "low": min(values), "high": max(values), "seeds": list(values)}


def formatted(number: str, values: tuple[float, ...], spread: bool = True) -> str:
    """``mean (low to high)`` of the seeds, in the unit of the number's label."""
    scale, form = SCALES.get(number, 1.0), _FORMATS[number]
    mean, low, high = (format(scale * value, form) for value in (float(np.mean(values)), min(values), max(values)))
    return f"{mean} ({low} to {high})" if spread and low != high else mean
