"""What the catalogue reads from docstrings: sections, settings, and what a method forgot to say."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from collegium.catalog import DOCUMENTED, KINDS, SECTIONS, Method, Setting, claims, methods, sections_of

ROOT = Path(__file__).parents[2]
ROUTING = [one for one in methods() if one.kind in DOCUMENTED]
Colour = Literal["red", "green"]


def of(obj: Any, kind: str = "selection") -> Method:
    return Method("mine", kind, "no paper", None, obj.__module__, obj)


@pytest.mark.parametrize("one", ROUTING, ids=[f"{one.kind}/{one.name}" for one in ROUTING])
def test_methods_of_routing_say_all_that_their_page_shows(one: Method) -> None:
    assert not one.missing(), f"{one.module}: say {', '.join(one.missing())} in the docstring, see CONTRIBUTING.md"
    if is_dataclass(one.obj):
        said = re.findall(r"^([\w, ]+): ", sections_of(one.obj.__doc__ or "")[1].get("Attributes", ""), re.MULTILINE)
        gone = {name for names in said for name in names.split(", ")} - {each.name for each in fields(one.obj)}
        assert not gone, f"{one.module} explains settings that there are not: {', '.join(gone)}"


def test_kinds_with_sections_are_kinds() -> None:
    assert set(DOCUMENTED) <= set(KINDS)


@dataclass(frozen=True)
class Base:
    """A base.

    Attributes:
        inherited: of the base.
    """

    inherited: float = 0.5


@dataclass(frozen=True)
class Silent(Base):
    """It says little.

    Formula:
        y = x

            indented stays so

    More prose, with a word: that is no section.

    Cost:

    Attributes:
        first, second: of both,
            on two lines: this is the second.
        colour: a choice.
    """

    first: int = field(kw_only=True)
    second: int | None = None
    colour: Colour = "red"
    unsaid: Literal["a", "b"] = "a"
    many: tuple[int, ...] = field(default_factory=lambda: (1, 2))


def test_sections_settings_and_what_is_missing() -> None:
    one = of(Silent)
    assert one.text == "It says little.\n\nMore prose, with a word: that is no section."
    assert one.sections == {"Formula": "y = x\n\n    indented stays so", "Cost": ""}
    both = "of both, on two lines: this is the second."
    assert sorted(one.settings, key=lambda each: each.name) == [
        Setting("colour", '"red" or "green"', '"red"', "a choice."),
        Setting("first", "int", None, both),
        Setting("inherited", "float", "0.5", "of the base."),
        Setting("many", "tuple[int, ...]", "(1, 2)", ""),
        Setting("second", "int or None", "None", both),
        Setting("unsaid", '"a" or "b"', '"a"', ""),
    ]
    assert sorted(one.missing()) == ["Cost:", "Not:", "Use it:", "what many means", "what unsaid means"]


def function(x: int, said: int = 1, *, unsaid: int = 2) -> int:
    """A function.

    Args:
        x: what it works on, no setting.
        said: a setting.
    """
    return x + said + unsaid


class Built:
    """A class.

    Args:
        needed: one that must be given.
    """

    def __init__(self, needed: int, other: int = 0) -> None:
        self.needed = needed + other


def test_settings_of_functions_and_classes_are_the_arguments_they_explain() -> None:
    assert of(function).settings == [Setting("said", "int", "1", "a setting.")]
    assert of(Built).settings == [Setting("needed", "int", None, "one that must be given.")]


def test_a_module_about_one_method_is_part_of_its_text() -> None:
    by_name = {(one.kind, one.name): one for one in methods()}
    assert "the expert with the least ``f / dist`` leaves" in by_name["cache", "edgemoe"].text
    assert "Legend" not in by_name["importance", "frequency"].text  # one of many in its module


def test_records_are_plain_and_whole() -> None:
    [record] = [one.record() for one in ROUTING if (one.kind, one.name) == ("selection", "top_p")]
    assert list(record["sections"]) == list(SECTIONS)
    assert {"name": "threshold", "type": "float", "default": "0.4"}.items() <= record["settings"][0].items()
    known = claims().get("selection/top_p")
    assert (record["obj"], record["claim"]) == ("TopP", known)
    assert record["status"] == (known["status"] if known else None)


def test_the_guide_lists_the_floors_that_are_checked() -> None:
    with (ROOT / "pyproject.toml").open("rb") as opened:
        [contract] = tomllib.load(opened)["tool"]["importlinter"]["contracts"]
    checked = [re.findall(r"\w+", layer) for layer in contract["layers"]]
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = guide.partition("(`lint-imports` checks it):\n\n")[2].partition("\n\n")[0]
    assert [line.strip().split(", ") for line in listed.splitlines()] == checked
