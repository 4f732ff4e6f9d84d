"""Measures on traces whose routing is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from collegium.errors import TraceError
from collegium.measure import domain_information, load
from collegium.trace import LayerMeta, LayerRows, Trace, TraceMeta, TraceWriter
from collegium.trace.schema import column_names

E, DOCUMENTS, LENGTH = 4, 40, 32


def trace_of(
    folder: Path, expert: np.ndarray, domain: np.ndarray, domains: tuple[str, ...] = ("code", "prose")
) -> Trace:
    """One layer; `expert` [N, 1] ids, `domain` [N], documents of `LENGTH` tokens."""
    N = len(expert)
    meta = TraceMeta(
        model="made up",
        family="none",
        layers=(LayerMeta(layer=2, path="layers.2", num_experts=E, top_k=1, score="softmax"),),
        data="numbers",
        domains=domains,
        columns=column_names([2], logits=False, gate_inputs=False),
        created="2026-11-22T00:00:00+00:00",
        collegium="0",
    )
    place = np.arange(N)
    tokens = {"sequence": place // LENGTH, "document": place // LENGTH, "position": place % LENGTH, "token": place}
    with TraceWriter(folder, meta, part_rows=300) as writer:
        writer.add({**tokens, "domain": domain}, [LayerRows(expert.reshape(-1), np.ones(N, np.float16))])
    return Trace.open(folder)


def alternating() -> np.ndarray:
    """[N] domain of each token: documents alternate."""
    return (np.arange(DOCUMENTS * LENGTH) // LENGTH) % 2


def test_load_of_known_counts(tmp_path: Path) -> None:
    expert = np.repeat([0, 0, 1, 3], 80)
    (found,) = load(trace_of(tmp_path / "t", expert, np.zeros(320, int)))
    assert found.layer == 2
    assert found.counts.tolist() == [160, 80, 0, 80]
    assert found.share.tolist() == [0.5, 0.25, 0.0, 0.25]
    assert found.max_violation == pytest.approx(1.0)
    assert found.entropy == pytest.approx(1.5)
    assert found.dead == (2,)


def test_uniform_load_is_perfect(tmp_path: Path) -> None:
    (found,) = load(trace_of(tmp_path / "t", np.arange(320) % E, np.zeros(320, int)))
    assert found.max_violation == pytest.approx(0)
    assert found.entropy == pytest.approx(2)
    assert found.dead == ()


def test_experts_of_their_own_give_one_bit_and_the_control_little(tmp_path: Path) -> None:
    domain = alternating()
    expert = 2 * domain + np.random.default_rng(0).integers(0, 2, len(domain))
    (found,) = domain_information(trace_of(tmp_path / "t", expert, domain))
    assert found.bits == pytest.approx(1.0)
    assert found.control < 0.15
    assert found.control <= found.control_high < found.bits
    assert found.share[0, 2:].sum() == found.share[1, :2].sum() == 0
    assert np.allclose(found.share.sum(1), 1)


def test_routing_that_ignores_domains_is_no_better_than_the_control(tmp_path: Path) -> None:
    expert = np.random.default_rng(0).integers(0, E, DOCUMENTS * LENGTH)
    (found,) = domain_information(trace_of(tmp_path / "t", expert, alternating()))
    assert found.bits <= 1.5 * found.control_high
    assert found.bits < 0.02


def test_documents_that_differ_by_chance_raise_the_control(tmp_path: Path) -> None:
    """Each document uses one expert: few documents look specialised whatever their labels, and the control shows it."""
    document = np.arange(8 * LENGTH) // LENGTH
    trace = trace_of(tmp_path / "t", np.random.default_rng(1).integers(0, E, 8)[document], document % 2)
    (found,) = domain_information(trace)
    assert found.control > 0.2


def test_the_control_is_the_same_every_time(tmp_path: Path) -> None:
    domain = alternating()
    trace = trace_of(tmp_path / "t", domain, domain)
    first, second = domain_information(trace)[0], domain_information(trace)[0]
    assert (first.control, first.control_high) == (second.control, second.control_high)
    assert domain_information(trace, seed=1)[0].control != first.control


def test_one_domain_has_no_answer(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t", np.zeros(320, int), np.zeros(320, int))
    with pytest.raises(TraceError, match="domain labels"):
        domain_information(trace)


def test_measuring_needs_no_torch(tmp_path: Path) -> None:
    trace_of(tmp_path / "t", alternating(), alternating())
    program = (
        "import sys; from collegium import Trace; from collegium.measure import domain_information, load\n"
        "t = Trace.open(sys.argv[1]); load(t); domain_information(t); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "t")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
