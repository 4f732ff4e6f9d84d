"""Requests refuse what they cannot mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.decode import FieldError, Request
from collegium.decode.request import RANGES

NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=True, allow_infinity=True))


@given(st.sampled_from(sorted(RANGES)), NUMBERS)
def test_numbers_are_in_range_or_refused_by_name(name: str, value: Any) -> None:
    allowed = RANGES[name]
    fine = (isinstance(value, int) or not allowed.whole) and allowed.low <= value <= allowed.high
    if fine and not (allowed.open and value == allowed.low):
        assert getattr(Request((1,), **{name: value}), name) == value
        return
    with pytest.raises(FieldError, match=f"^{name} must be") as refused:
        Request((1,), **{name: value})
    assert refused.value.field == name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ()),
        ("prompt", (1, -2)),
        ("prompt", (True,)),
        ("temperature", "1"),
        ("temperature", True),
        ("presence_penalty", None),
        ("stop", ("",)),
        ("stop", ("x" * 2000,)),
        ("stop", ("x",) * 99),
        ("stop", (3,)),
    ],
)
def test_wrong_types_and_sizes(field: str, value: Any) -> None:
    with pytest.raises(FieldError) as refused:
        Request(**{"prompt": (1,), field: value})
    assert refused.value.field == field
    assert len(str(refused.value)) < 200, "a huge value is not repeated"


def test_the_context_is_named() -> None:
    request = Request((1,) * 10)
    assert request.fit(32, 5) == 22
    assert replace(request, max_tokens=3).fit(32, 5) == 3
    with pytest.raises(FieldError, match="ask for at most 22") as refused:
        replace(request, max_tokens=23).fit(32, 5)
    assert refused.value.field == "max_tokens"
    with pytest.raises(FieldError, match="context of 10 must hold it"):
        request.fit(10, 5)
    with pytest.raises(FieldError, match="vocabulary has 0 to 0"):
        request.fit(32, 1)
