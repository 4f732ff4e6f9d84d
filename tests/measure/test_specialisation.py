"""Information between domains and experts, on traces whose routing is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collegium.errors import TraceError
from collegium.measure.specialisation import domain_information
from collegium.trace import Trace
from measure_traces import make_trace

E, DOCUMENTS, LENGTH = 4, 40, 32
N = DOCUMENTS * LENGTH


def trace_of(folder: Path, expert: Any, domain: Any, names: tuple[str, ...] = ("code", "prose")) -> Trace:
    """One layer of documents of `LENGTH` tokens."""
    expert = np.asarray(expert).reshape(len(domain), -1)
    return make_trace(
        folder, {2: expert}, E, domains=domain, domain_names=names, sequences=np.arange(len(domain)) // LENGTH
    )


def alternating() -> np.ndarray:
    """[N] domain of each token: documents alternate."""
    return (np.arange(N) // LENGTH) % 2


def test_experts_of_their_own_give_one_bit_and_the_control_little(tmp_path: Path) -> None:
    domain = alternating()
    expert = 2 * domain + np.random.default_rng(0).integers(0, 2, N)
    (found,) = domain_information(trace_of(tmp_path / "t", expert, domain))
    assert found.bits.value == pytest.approx(1.0)
    assert found.bits.low == pytest.approx(1.0)  # every document gives one bit
    assert found.control < 0.15
    assert found.control <= found.control_high < found.bits.low
    assert found.share[0, 2:].sum() == found.share[1, :2].sum() == 0
    assert np.allclose(found.share.sum(1), 1)


def test_the_interval_shows_how_unlike_documents_are(tmp_path: Path) -> None:
    """Some documents keep to their domain's experts and some do not: the value lies within, the width is theirs."""
    rng = np.random.default_rng(0)
    domain, keeps = alternating(), np.repeat(rng.random(DOCUMENTS) < 0.6, LENGTH)
    expert = np.where(keeps, 2 * domain, rng.integers(0, E, N))
    (found,) = domain_information(trace_of(tmp_path / "t", expert, domain))
    assert found.bits.low < found.bits.value < found.bits.high
    assert 0.05 < found.bits.high - found.bits.low < 0.5


def test_routing_that_ignores_domains_is_no_better_than_the_control(tmp_path: Path) -> None:
    expert = np.random.default_rng(0).integers(0, E, N)
    (found,) = domain_information(trace_of(tmp_path / "t", expert, alternating()))
    assert found.bits.value <= 1.5 * found.control_high
    assert found.bits.value < 0.02


def test_documents_that_differ_by_chance_raise_the_control(tmp_path: Path) -> None:
    """Each document uses one expert: few documents look specialised whatever their labels, and the control shows it."""
    document = np.arange(8 * LENGTH) // LENGTH
    trace = trace_of(tmp_path / "t", np.random.default_rng(1).integers(0, E, 8)[document], document % 2)
    (found,) = domain_information(trace)
    assert found.control > 0.2


def test_the_control_is_the_same_every_time(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t", alternating(), alternating())
    first, second = domain_information(trace)[0], domain_information(trace)[0]
    assert (first.control, first.control_high) == (second.control, second.control_high)
    assert domain_information(trace, seed=1)[0].control != first.control


def test_an_empty_domain_and_ragged_tokens(tmp_path: Path) -> None:
    domain = alternating()
    expert = np.stack([2 * domain, np.where(np.arange(N) % 3, E, 2 * domain + 1)], 1)
    (found,) = domain_information(trace_of(tmp_path / "t", expert, domain, ("code", "prose", "verse")))
    assert found.bits.value == pytest.approx(1.0)
    assert found.share[2].tolist() == [0] * E
    assert found.share[0].tolist() == pytest.approx([0.75, 0.25, 0, 0], abs=0.001)


def test_documents_recorded_step_by_step(tmp_path: Path) -> None:
    """Generated text: all documents' first tokens, then their second ones."""
    step, row = np.divmod(np.arange(N), DOCUMENTS)
    domain = row % 2
    trace = make_trace(
        tmp_path / "t", {0: 2 * domain[:, None]}, E, domains=domain, domain_names=("a", "b"), sequences=row,
        positions=step,
    )  # fmt: skip
    assert domain_information(trace)[0].bits.value == pytest.approx(1.0)


def test_one_domain_has_no_answer(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t", np.zeros(N, int), np.zeros(N, int))
    with pytest.raises(TraceError, match="domain labels"):
        domain_information(trace)
