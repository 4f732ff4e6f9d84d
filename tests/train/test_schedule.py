from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.catalog import methods
from collegium.errors import ConfigError
from collegium.train.recipe import ScheduleSpec
from collegium.train.schedule import WSD, build_schedule

NAMES = [m.name for m in methods("schedule")]


@pytest.mark.parametrize("name", NAMES)
@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    final=st.floats(0, 1),
)
def test_contract(name: str, steps: int, warmup: float, decay: float, final: float) -> None:
    schedule = build_schedule(ScheduleSpec(name=name, warmup=warmup, decay=decay, final=final))
    factors = [schedule(step, steps) for step in range(steps)]
    rising = round(warmup * steps)
    assert all(0 <= f <= 1 + 1e-12 for f in factors)
    assert all(a <= b for a, b in pairwise(factors[:rising]))
    assert all(a >= b - 1e-12 for a, b in pairwise(factors[rising:]))
    if rising:
        assert factors[rising - 1] == 1
    falls = name != "wsd" or round(decay * steps) > 0
    if falls and steps - rising > 1:
        assert factors[-1] == pytest.approx(final)


def test_wsd_is_flat_between_warmup_and_decay() -> None:
    schedule = WSD(warmup=0.1, final=0.0, decay=0.2)
    factors = [schedule(step, 100) for step in range(100)]
    assert set(factors[9:80]) == {1.0}
    # one minus square root: most of the fall comes first
    assert factors[84] == pytest.approx(1 - (5 / 20) ** 0.5)


def test_an_unknown_schedule_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"zigzag.*cosine, wsd"):
        build_schedule(ScheduleSpec(name="zigzag"))
