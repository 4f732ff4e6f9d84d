"""Batches in the simulator: the same tokens, regrouped or not, and as a run of a batch would have recorded them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_simulate import COST, settings_of

from collegium.errors import ConfigError
from collegium.offload.predictors import find_predictor
from collegium.offload.schedule.regroup import Regroup
from collegium.offload.simulate import simulate
from collegium.offload.simulate_batch import batched, distinct_experts, predicted_experts
from collegium.offload.simulate_passes import Passes
from collegium.trace import Trace
from measure_traces import make_trace

E, K = 12, 2


def two_kinds(folder: Path, lengths: list[int], seed: int = 0) -> Trace:
    """Sequences that use the first or the second half of the experts, by turns; token ids tell which."""
    draw = np.random.default_rng(seed)
    sequences = np.repeat(np.arange(len(lengths)), lengths)
    kind = sequences // 2 % 2
    N = len(sequences)
    experts = {
        layer: np.argsort(draw.random((N, E // 2)), axis=1)[:, :K] + kind[:, None] * (E // 2) for layer in (0, 1)
    }
    return make_trace(folder, experts, E, sequences=sequences, tokens=kind * 50 + draw.integers(0, 3, N))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=9),
    size=st.integers(1, 5),
    batches=st.sampled_from([1, 2]),
    regroup=st.booleans(),
)
def test_every_token_once_and_each_sequence_in_its_order(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], size: int, batches: int, regroup: bool
) -> None:
    passes = Passes(two_kinds(tmp_path_factory.mktemp("t"), lengths))
    how = Regroup() if regroup and batches == 2 and size > 1 else None
    found = batched(passes, size, batches, how)
    assert sorted(found.rows.tolist()) == list(range(sum(lengths)))
    sequence = np.repeat(np.arange(len(lengths)), lengths)[found.rows]
    for one in range(len(lengths)):
        own = found.rows[sequence == one]
        assert (np.diff(own) > 0).all()
    counts = np.diff(found.edges)
    assert counts.max() <= size
    assert counts[0] == min(size, len(lengths)) or batches == 2
    for first, last in zip(found.edges[:-1], found.edges[1:], strict=True):
        assert len(set(sequence[first:last].tolist())) == last - first
    np.testing.assert_array_equal(found.tokens, passes.tokens[found.rows])
    np.testing.assert_array_equal(found.experts[1], passes.experts[1][found.rows])
    assert found.fresh.sum() <= len(lengths)


def test_a_batch_is_what_a_run_of_it_records(tmp_path: Path) -> None:
    """Three sequences in step: their prompts, then a token of each at a time."""
    draw = np.random.default_rng(0)
    phases = ["prefill"] * 6 + (["decode"] * 3 + ["verify"] * 3) * 2  # by turns, so that each is a step of its own
    sequences = [0, 0, 1, 1, 2, 2] + [0, 1, 2] * 4
    positions = [0, 1] * 3 + [2 + at // 3 for at in range(12)]
    experts = {layer: np.argsort(draw.random((18, 6)), 1)[:, :2] for layer in (0, 1)}
    trace = make_trace(tmp_path, experts, 6, sequences=sequences, positions=positions, phases=phases)
    found, recorded = batched(Passes(trace), 3), Passes(trace, by="recorded")
    assert found.by == "batches"
    assert np.diff(found.edges).tolist() == [2, 2, 2, 3, 3, 3, 3]
    assert np.diff(recorded.edges).tolist() == [6, 3, 3, 3, 3]
    assert found.decode.tolist() == [False] * 3 + [True] * 4
    np.testing.assert_array_equal(found.rows, recorded.rows)
    for number in range(4):
        ours, theirs = found.step(3 + number, 1), recorded.step(1 + number, 1)
        for field in ("experts", "weights", "counts", "order"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))


def test_one_sequence_at_a_time_is_no_batch(tmp_path: Path) -> None:
    passes = Passes(two_kinds(tmp_path, [5, 3, 4]))
    alone = simulate(passes, settings_of(capacity=6), COST)
    found = simulate(batched(passes, 1), settings_of(capacity=6), COST)
    for column in ("step", "layer", "expert", "found", "evicted"):
        np.testing.assert_array_equal(found.log[column], alone.log[column])
    assert found.decode_seconds == alone.decode_seconds


def test_regrouped_batches_touch_fewer_experts(tmp_path: Path) -> None:
    passes = Passes(two_kinds(tmp_path / "a", [15] * 16))
    plain = batched(passes, 4, 2)
    oracle = batched(passes, 4, 2, Regroup())
    predictor = find_predictor("token_id").build(passes.geometry, trace=two_kinds(tmp_path / "b", [15] * 16, seed=1))
    predicted = batched(passes, 4, 2, Regroup(), predicted_experts(passes, predictor))
    assert distinct_experts(oracle) <= distinct_experts(predicted) < 0.8 * distinct_experts(plain)
    runs = [simulate(one, settings_of(capacity=24), COST) for one in (plain, oracle)]
    assert runs[1].requests < runs[0].requests
    assert runs[1].tokens_per_second > runs[0].tokens_per_second
    assert runs[0].tokens == runs[1].tokens == 240


def test_what_cannot_be_batched_is_refused(tmp_path: Path) -> None:
    trace = two_kinds(tmp_path, [3, 3])
    passes = Passes(trace)
    for arguments, message in (
        ((0,), "at least 1"),
        ((2, 1, Regroup()), "nothing to regroup"),
        ((1, 2, Regroup()), "nothing to regroup"),
    ):
        with pytest.raises(ConfigError, match=message):
            batched(passes, *arguments)
    with pytest.raises(ConfigError, match="batches already"):
        batched(Passes(trace, by="recorded"), 2)
    with pytest.raises(ConfigError, match="batches already"):
        batched(batched(passes, 2), 2)
    with pytest.raises(ConfigError, match="all layers before"):
        predicted_experts(passes, find_predictor("path").build(passes.geometry, trace=trace))
