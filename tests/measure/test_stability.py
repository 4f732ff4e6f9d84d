"""Two traces of the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from collegium.errors import TraceError
from collegium.measure.stability import early_routing, routing_fluctuation
from measure_traces import make_trace


def test_changes_counted_by_hand(tmp_path: Path) -> None:
    one = make_trace(tmp_path / "a", {0: [[0, 1], [2, 3], [0, 3], [1, 2]]}, 4)
    two = make_trace(tmp_path / "b", {0: [[1, 0], [2, 3], [3, 0], [1, 3]]}, 4)  # the order of slots means nothing
    (found,) = routing_fluctuation(one, two)
    assert found.changed.value == pytest.approx(0.25)
    assert found.overlap.value == pytest.approx(0.875)
    assert found.entropy == pytest.approx(2)
    assert found.other_entropy == pytest.approx(1.9056, abs=1e-4)  # 2, 2, 1, 3 of 8


def test_the_same_routing_in_another_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    experts = {0: np.stack([rng.permutation(6)[:2] for _ in range(60)])}
    sequence, position, token = np.arange(60) // 10, np.arange(60) % 10, rng.integers(0, 9, 60)
    one = make_trace(tmp_path / "a", experts, 6, tokens=token, sequences=sequence, positions=position)
    order = np.lexsort((sequence, position))
    two = make_trace(
        tmp_path / "b", {0: experts[0][order]}, 6, tokens=token[order], sequences=sequence[order],
        positions=position[order],
    )  # fmt: skip
    (found,) = routing_fluctuation(one, two)
    assert (found.changed.value, found.changed.high, found.overlap.value) == (0, 0, 1)


def test_ragged_tokens_and_other_k(tmp_path: Path) -> None:
    one = make_trace(tmp_path / "a", {0: [[0, 4], [4, 4], [2, 3]], 1: [[0], [1], [2]]}, {0: 4, 1: 3}, top_k=2)
    two = make_trace(tmp_path / "b", {0: [[0, 1, 2], [4, 4, 4], [3, 2, 4]], 1: [[0], [1], [0]]}, {0: 4, 1: 3})
    first, second = routing_fluctuation(one, two)
    assert first.changed.value == pytest.approx(1 / 3)
    assert first.overlap.value == pytest.approx((1 / 3 + 1 + 1) / 3)
    assert second.changed.value == pytest.approx(1 / 3)


def test_other_tokens_are_refused_and_the_first_difference_is_named(tmp_path: Path) -> None:
    base = make_trace(tmp_path / "base", {0: [[0], [1]]}, 2, tokens=[5, 6])
    for number, (change, message) in enumerate(
        [
            ({"experts": {1: [[0], [1]]}}, r"layers are \[0\] and \[1\]"),
            ({"num_experts": 3}, "layer 0 has 2 and 3 experts"),
            ({"experts": {0: [[0]]}, "tokens": [5]}, "2 and 1 tokens"),
            ({"tokens": [5, 9]}, "token 1 is number 6 at position 1 .* number 9 at position 1"),
            ({"positions": [0, 2]}, "number 6 at position 2"),
            ({"sequences": [0, 1]}, "number 6 at position 0 of sequence 1"),
        ]
    ):
        settings = {"experts": {0: [[0], [1]]}, "num_experts": 2, "tokens": [5, 6], **change}
        other = make_trace(tmp_path / str(number), **settings)
        for function in (routing_fluctuation, early_routing):
            with pytest.raises(TraceError, match=message):
                function(base, other)


def test_similarity_of_one_id_by_hand(tmp_path: Path) -> None:
    one = make_trace(tmp_path / "a", {0: [[0]] * 4}, 2, tokens=[3] * 4)
    two = make_trace(tmp_path / "b", {0: [[0], [1], [0], [1]]}, 2, tokens=[3] * 4)
    (found,) = early_routing(one, two, min_hits=4)
    assert found.ids == 1
    assert found.overlap.value == pytest.approx(0.5)
    assert found.similarity.value == pytest.approx(1 - (0.811278 - 0.5), abs=1e-6)
    assert np.isnan(found.control)  # there is no other id


def test_ids_that_keep_their_experts_beat_the_control(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    token = rng.integers(0, 20, 2000)
    home = rng.permutation(20) % 8
    wander = np.where(rng.random(2000) < 0.5, home[token], rng.integers(0, 8, 2000))
    one = make_trace(tmp_path / "a", {0: wander[:, None]}, 8, tokens=token, part_rows=4096)
    two = make_trace(tmp_path / "b", {0: home[token][:, None]}, 8, tokens=token, part_rows=4096)
    (same,), (found,) = early_routing(two, two), early_routing(one, two)
    assert (same.overlap.value, same.similarity.value) == (1, pytest.approx(1))
    assert found.overlap.value == pytest.approx(0.5 + 0.5 / 8, abs=0.05)
    assert found.similarity.low > found.control + 0.2
    assert found.overlap.low > found.control_overlap + 0.2


def test_no_id_is_frequent_enough(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", {0: [[0]]}, 2)
    (found,) = early_routing(trace, trace)
    assert found.ids == 0
    assert np.isnan(found.similarity.value)
    (same,) = routing_fluctuation(trace, trace)
    assert (same.changed.value, same.overlap.value) == (0, 1)
