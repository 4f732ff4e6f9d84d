"""What the arena measured, for claims that are read off its table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from collegium.arena import ArenaPlan

__all__ = ["Arm", "arm"]

ROOT = Path(__file__).parents[2]
FILE, PLAN = ROOT / "docs" / "results" / "routing.json", ROOT / "recipes" / "arena.yaml"


@dataclass(frozen=True)
class Arm:
    """One method of the arena. Attributes: its numbers, by name, of each seed."""

    name: str
    numbers: dict[str, list[float]]

    def mean(self, number: str) -> float:
        """Over seeds."""
        return sum(self.numbers[number]) / len(self.numbers[number])

    def says(self, number: str) -> str:
        """``mean (low to high)``."""
        values = self.numbers[number]
        return f"{self.mean(number):.3f} ({min(values):.3f} to {max(values):.3f})"


@cache
def _arms() -> dict[str, Arm]:
    record = json.loads(FILE.read_text(encoding="utf-8"))
    if record["plan"] != ArenaPlan.load(PLAN).model_dump(mode="json") or record["missing"]:
        pytest.fail(f"{FILE} is not of {PLAN}: run `collegium arena recipes/arena.yaml` and put its arena.json there")
    return {
        one["name"]: Arm(one["name"], {name: of["seeds"] for name, of in one["numbers"].items()})
        for one in record["methods"]
    }


def arm(name: str) -> Arm:
    """A method by its name in ``recipes/arena.yaml``."""
    return _arms()[name]
