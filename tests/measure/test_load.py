"""The load of experts: known counts, groups, intervals, drops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.errors import ConfigError, TraceError
from collegium.measure import load, plain
from collegium.measure.load import _load
from collegium.trace import LayerRows, Trace, TraceWriter
from collegium.trace.schema import column_names
from measure_traces import make_trace


def test_known_counts(tmp_path: Path) -> None:
    (found,) = load(make_trace(tmp_path, {2: np.repeat([0, 0, 1, 3], 80)[:, None]}, 4))
    assert (found.layer, found.group, found.dropped) == (2, None, None)
    assert found.counts.tolist() == [160, 80, 0, 80]
    assert found.share.tolist() == [0.5, 0.25, 0.0, 0.25]
    assert found.max_violation.value == pytest.approx(1.0)
    assert found.cv.value == pytest.approx(np.std([2, 1, 0, 1]))
    assert found.entropy.value == pytest.approx(1.5)
    assert (found.dead, found.cold) == ((2,), ())
    assert next(iter(found.summary())) == "layer"


def test_even_load(tmp_path: Path) -> None:
    (found,) = load(make_trace(tmp_path, {0: np.arange(320)[:, None] % 4}, 4))
    assert (found.max_violation.value, found.cv.value) == (pytest.approx(0), pytest.approx(0))
    assert found.entropy.value == pytest.approx(2)
    assert found.dead == found.cold == ()


def test_cold_is_below_a_tenth_of_an_even_share_and_not_dead(tmp_path: Path) -> None:
    experts = np.repeat([0, 1, 2], [980, 18, 2])[:, None]  # an even share of 1000 is 250
    (found,) = load(make_trace(tmp_path, {0: experts}, 4))
    assert (found.dead, found.cold) == ((3,), (1, 2))


def test_layers_of_different_sizes_with_unused_slots(tmp_path: Path) -> None:
    small = np.array([[0, 1], [1, 2], [2, 2]])  # E = 2: id 2 is an unused slot
    large = np.array([[299, 5, 0], [300, 5, 1], [5, 7, 300]])
    first, second = load(make_trace(tmp_path, {1: small, 3: large}, {1: 2, 3: 300}))
    assert first.counts.tolist() == [1, 2]
    assert second.counts[[0, 1, 5, 7, 299]].tolist() == [1, 1, 3, 1, 1]
    assert (len(second.share), second.counts.sum()) == (300, 7)


def test_groups_come_in_order_and_an_empty_one_has_no_numbers(tmp_path: Path) -> None:
    trace = make_trace(
        tmp_path,
        {0: [[0], [0], [1]], 1: [[1], [0], [1]]},
        2,
        domains=[0, 0, 2],
        domain_names=("code", "empty", "prose"),
        phases=["prefill", "prefill", "decode"],
    )
    found = load(trace, by="domain")
    assert [(at.layer, at.group) for at in found] == [(n, g) for n in (0, 1) for g in ("code", "empty", "prose")]
    assert [at.counts.tolist() for at in found[:3]] == [[2, 0], [0, 0], [0, 1]]
    assert found[1].share.tolist() == [0, 0]
    assert np.isnan(found[1].max_violation.value)
    assert plain(found)[1]["entropy"]["value"] is None
    phases = load(trace, by="phase")
    assert [at.counts.tolist() for at in phases[:3]] == [[2, 0], [0, 1], [0, 0]]
    assert sum(at.counts for at in phases[3:]).tolist() == load(trace)[1].counts.tolist()


def test_other_groups_and_empty_traces_are_refused(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", {0: [[0]]}, 2)
    with pytest.raises(ConfigError, match="'token'"):
        load(trace, by="token")  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="no tokens"):
        load(make_trace(tmp_path / "empty", {0: np.empty((0, 1), int)}, 2))


def test_an_expert_twice_in_a_token_is_refused(tmp_path: Path) -> None:
    experts = np.array([[0, 1], [1, 2], [2, 2], [0, 3]])
    with pytest.raises(TraceError, match=r"row 2 lists an expert of layer 5 twice"):
        load(make_trace(tmp_path, {5: experts}, 4))


def test_the_interval_is_wider_for_fewer_documents_and_absent_for_one(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    experts = random.permuted(np.tile(np.arange(8), (1024, 1)), axis=1)[:, :2]

    def width(tokens_each: int) -> float:
        documents = np.arange(1024) // tokens_each
        (found,) = load(make_trace(tmp_path / str(tokens_each), {0: experts}, 8, sequences=documents))
        assert not found.entropy.low > found.entropy.high
        return found.cv.high - found.cv.low

    assert np.isnan(width(1024))
    assert 0 < width(16) < 0.2


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_covers_the_truth(seed: int) -> None:
    """Entropy of known probabilities, from 40 documents whose preferences differ."""
    random = np.random.default_rng(seed)
    truth = np.array([0.4, 0.3, 0.2, 0.1])
    counts = np.array([random.multinomial(200, random.dirichlet(30 * truth)) for _ in range(40)])
    found = _load(0, None, counts, None)
    assert found.entropy.low - 0.02 < -(truth * np.log2(truth)).sum() < found.entropy.high + 0.02
    assert found.entropy.high - found.entropy.low < 0.1


def test_drops_are_told_apart_from_what_was_kept() -> None:
    found = _load(0, None, np.array([[4, 4], [4, 4]]), np.array([16, 0]))
    assert found.max_violation.value == 0
    assert found.requested_max_violation == pytest.approx(24 / 16 - 1)
    assert found.counts.tolist() == [8, 8]
    assert found.summary()["MaxVio before drops"] == found.requested_max_violation


def test_drops_of_a_trace_that_records_them(tmp_path: Path) -> None:
    meta = make_trace(tmp_path / "without", {0: [[0]], 1: [[0]]}, {0: 2, 1: 300}, domain_names=("a", "b")).meta
    meta = meta.model_copy(
        update={"columns": column_names([0, 1], logits=False, gate_inputs=False, dropped=True), "complete": False}
    )
    one = np.ones(3, np.int64)
    tokens = {name: np.arange(3) for name in ("token", "position")} | {"sequence": 0 * one, "document": 0 * one}
    first = LayerRows(np.array([0, 1, 1]), 0.5 * one, dropped=np.array([1, 1]), dropped_lengths=np.array([0, 2, 0]))
    second = LayerRows(np.array([5, 6, 299]), 0.5 * one)
    with TraceWriter(tmp_path / "with", meta) as writer:
        writer.add({**tokens, "domain": np.array([0, 1, 1])}, [first, second])
    trace = Trace.open(tmp_path / "with")
    small, large = load(trace)
    assert (small.counts.tolist(), small.dropped.tolist()) == ([1, 2], [0, 2])
    assert small.max_violation.value == pytest.approx(2 / 1.5 - 1)
    assert small.requested_max_violation == pytest.approx(4 / 2.5 - 1)
    assert (large.dropped.shape, large.requested_max_violation) == ((300,), pytest.approx(large.max_violation.value))
    assert [at.dropped.tolist() for at in load(trace, by="domain")[:2]] == [[0, 0], [0, 2]]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1 << 30), E=st.integers(2, 12), K=st.integers(1, 2), N=st.integers(1, 60))
def test_relabelled_experts_and_doubled_documents(
    tmp_path_factory: pytest.TempPathFactory, seed: int, E: int, K: int, N: int
) -> None:
    random = np.random.default_rng(seed)
    experts = np.stack([random.permutation(E + 1)[:K] for _ in range(N)])  # E is an unused slot
    names = np.append(random.permutation(E), E)
    documents = np.sort(random.integers(0, 5, N))
    folder = tmp_path_factory.mktemp("traces")
    (one,) = load(make_trace(folder / "one", {0: experts}, E, sequences=documents))
    (other,) = load(make_trace(folder / "other", {0: names[experts]}, E, sequences=documents))
    assert other.share[names[:E]] == pytest.approx(one.share)
    for name in ("max_violation", "cv", "entropy"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert [theirs.value, theirs.low] == pytest.approx([mine.value, mine.low], nan_ok=True)
    assert len(one.dead) == len(other.dead)
    twice = np.concatenate([documents, 5 + documents])
    (double,) = load(make_trace(folder / "double", {0: np.tile(experts, (2, 1))}, E, sequences=twice))
    assert double.share == pytest.approx(one.share)
    assert load(make_trace(folder / "mixed", {0: random.permutation(experts)}, E))[0].share == pytest.approx(one.share)
