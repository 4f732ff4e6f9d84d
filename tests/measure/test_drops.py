"""Empty slots along the sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from collegium.measure.drops import drops
from measure_traces import make_trace


def test_counted_by_hand(tmp_path: Path) -> None:
    experts = [[0, 1], [1, 2], [0, 3], [3, 3], [2, 1], [0, 1], [1, 2], [0, 3]]  # 3 is an unused slot
    trace = make_trace(
        tmp_path / "t", {5: experts}, 3, sequences=[0] * 4 + [1] * 4, domains=[0] * 4 + [1] * 4,
        domain_names=("near", "far", "empty"), part_rows=3,
    )  # fmt: skip
    (found,) = drops(trace)
    assert found.layer == 5
    assert found.position.tolist() == [0, 1, 2, 3]  # no more bins than positions
    assert found.ratio.tolist() == [0, 0, 0.25, 0.75]
    assert found.by_domain.tolist() == [[0, 0, 0.5, 1], [0, 0, 0, 0.5], [0, 0, 0, 0]]
    assert found.tokens.tolist() == [[1] * 4, [1] * 4, [0] * 4]
    assert found.summary()["slots without an expert"] == pytest.approx(0.25)
    (halves,) = drops(trace, bins=2)
    assert halves.position.tolist() == [0, 2]
    assert halves.ratio.tolist() == [0, 0.5]


@pytest.mark.parametrize(("length", "bins"), [(10, 4), (16, 16), (7, 3), (100, 16)])
def test_a_token_is_in_the_bin_of_its_edge(tmp_path: Path, length: int, bins: int) -> None:
    (found,) = drops(make_trace(tmp_path / "t", {0: np.zeros((length, 1), int)}, 1), bins=bins)
    edges = [*found.position.tolist(), length]
    assert np.diff(edges).tolist() == found.tokens[0].tolist()


def test_nothing_dropped(tmp_path: Path) -> None:
    for found in drops(make_trace(tmp_path / "t", {0: [[0], [1]], 1: [[0, 1], [2, 3]]}, {0: 2, 1: 4})):
        assert not found.ratio.any()
        assert not found.by_domain.any()


def test_more_experts_than_nominal_fill_no_other_tokens_slots(tmp_path: Path) -> None:
    (found,) = drops(make_trace(tmp_path / "t", {0: [[0, 1, 2], [0, 4, 4]]}, 4, top_k=2))
    assert found.ratio.tolist() == [0, 0.5]


def test_a_trace_without_tokens(tmp_path: Path) -> None:
    (found,) = drops(make_trace(tmp_path / "t", {0: np.zeros((0, 2), int)}, 2))
    assert found.ratio.tolist() == [0]
    assert found.summary()["slots without an expert"] == 0
