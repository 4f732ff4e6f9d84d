"""Empty slots along the sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    assert found.summary()["slots without an expert"].value == pytest.approx(0.25)
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
    assert found.summary()["slots without an expert"].value == 0
    assert found.interval is None


def dropping(folder: Path, count: int, *, order: np.ndarray | None = None, length: int = 32) -> Any:
    """Documents that lose ever more slots towards their end, each at its own rate."""
    random = np.random.default_rng(0)
    documents = [
        np.where(random.random((length, 2)) < rate * np.arange(length)[:, None] / length, 4, [0, 1])
        for rate in random.random(count)
    ]
    order = np.arange(count) if order is None else order
    experts = np.concatenate([documents[i] for i in order])
    (found,) = drops(make_trace(folder, {0: experts}, 4, sequences=np.repeat(np.arange(count), length)), bins=8)
    return found


def test_intervals_hold_the_ratio_and_shrink_with_more_documents(tmp_path: Path) -> None:
    few, many = (dropping(tmp_path / str(count), count) for count in (8, 128))
    for found in (few, many):
        low, high = found.interval.T
        assert ((low >= 0) & (low <= found.ratio) & (found.ratio <= high) & (high <= 1)).all()
        assert found.overall.low <= found.overall.value <= found.overall.high
        assert found.overall.value == pytest.approx(found.ratio.mean())  # bins of as many tokens
    assert (many.interval[-1, 1] - many.interval[-1, 0]) < (few.interval[-1, 1] - few.interval[-1, 0]) / 2
    assert many.summary()["in the last positions"].low > many.summary()["in the first positions"].high


def test_the_order_of_documents_changes_no_ratio_and_hardly_an_interval(tmp_path: Path) -> None:
    one = dropping(tmp_path / "one", 100)
    other = dropping(tmp_path / "other", 100, order=np.random.default_rng(3).permutation(100))
    assert one.ratio.tolist() == other.ratio.tolist()
    assert np.diff(one.interval)[-1, 0] == pytest.approx(np.diff(other.interval)[-1, 0], rel=0.4)


def test_one_document_has_no_interval(tmp_path: Path) -> None:
    found = dropping(tmp_path, 1)
    assert found.interval is None
    assert np.isnan(found.overall.low)


def test_positions_of_a_single_document_have_none(tmp_path: Path) -> None:
    """Only the second document is longer than one token, only a token of it stands at the end."""
    trace = make_trace(tmp_path, {0: [[0, 4], [0, 1], [4, 4]]}, 4, sequences=[0, 1, 1], positions=[0, 0, 7])
    (found,) = drops(trace, bins=4)
    assert found.ratio.tolist() == [0.25, 0, 0, 1]
    assert np.isnan(found.interval[1:3]).all()
    assert found.interval[3].tolist() == [1, 1]
    assert found.interval[0, 0] <= 0.25 <= found.interval[0, 1]
