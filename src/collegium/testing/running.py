"""Runs checks one after another and says which one failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["run_all"]

Make = TypeVar("Make")


def run_all(checks: Sequence[Callable[[Make], None]], make: Make) -> None:
    """Call every check with `make`. Raises AssertionError, which names the first check that fails, or that
    something else was raised in."""
    for check in checks:
        try:
            check(make)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{check.__name__}: {type(error).__name__}: {error}") from error
