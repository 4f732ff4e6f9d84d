"""The verdict: each rule on both sides of its thresholds."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hand_made import make_curve, make_information, make_load, make_locality

from collegium.report.measured import Measured
from collegium.report.verdict import Finding, verdict
from collegium.trace import Trace


def findings(expert_bytes: int | None = None, **results: Any) -> dict[str, Finding]:
    measured = Measured(cast(Trace, None), results)
    return {finding.question: finding for finding in verdict(measured, expert_bytes=expert_bytes)}


def the(expert_bytes: int | None = None, **results: Any) -> Finding:
    (finding,) = findings(expert_bytes, **results).values()
    return finding


@pytest.mark.parametrize(
    ("counts", "answer"),
    [([10, 10, 10, 10], "yes"), ([16, 8, 8, 8], "partly"), ([40, 1, 1, 1], "no"), ([10, 10, 10, 0], "no")],
)
def test_balance(counts: list[int], answer: str) -> None:
    finding = the(load=[make_load(0, counts), make_load(1, counts)])
    assert finding.answer == answer
    assert f"{max(counts) / sum(counts) * 4:.2f} times an even share" in finding.text


def test_dead_experts_are_named_in_the_verdict() -> None:
    assert (
        "2 of 8 experts were never used" in the(load=[make_load(0, [10, 10, 10, 0]), make_load(1, [9, 9, 0, 9])]).text
    )


@pytest.mark.parametrize(
    ("bits", "control", "answer"), [(0.8, 0.1, "yes"), (0.2, 0.05, "slightly"), (0.1, 0.1, "no"), (0.02, 0.0, "no")]
)
def test_specialisation(bits: float, control: float, answer: str) -> None:
    finding = the(domains=[make_information(0, bits, control)])
    assert finding.answer == answer
    assert f"{bits:.2f} of at most 1.58 bits" in finding.text
    assert ("sends" in finding.text) == (answer != "no")


def test_offloading_names_the_smallest_cache_that_serves_enough() -> None:
    finding = the(cache=[make_curve(0, [0.5, 0.85, 0.9, 1.0])])
    assert finding.answer == "yes"
    assert "Keeping about 4 of 8 experts (46% of each layer)" in finding.text
    assert "serves 80% of the requests" in finding.text


def test_offloading_speaks_bytes_when_the_size_of_an_expert_is_known() -> None:
    finding = the(2_000_000, cache=[make_curve(0, [0.5, 0.85, 0.9, 1.0])])
    assert "46% of each layer, 8 MB" in finding.text
    assert "All experts together are 16 MB." in finding.text


def test_offloading_is_not_worth_it_when_most_experts_must_stay() -> None:
    assert the(cache=[make_curve(0, [0.2, 0.4, 0.6, 0.95])]).answer == "hardly"
    assert the(cache=[make_curve(0, [0.2, 0.4, 0.82, 0.95])]).answer == "a little"
    assert the(cache=[make_curve(0, [0.0, 0.0, 0.0, 0.1])]).answer == "no"


def test_locality_is_part_of_the_answer_on_offloading() -> None:
    curves = [make_curve(0, [0.5, 0.85, 0.9, 1.0])]
    text = the(cache=curves, locality=[make_locality(0), make_locality(None, 0.7)]).text
    assert "locally consistent: SRP 0.60 over 16 tokens, 0.40 when" in text
    assert "little local consistency" in the(cache=curves, locality=[make_locality(None, 0.5)]).text


def test_odd_layers() -> None:
    even = [make_load(layer, [10, 10, 10, 11 + layer % 2]) for layer in range(6)]
    assert findings(load=even)["Which layers are odd?"].answer == "none"
    odd = [*even[:5], make_load(7, [40, 1, 1, 1])]
    finding = findings(load=odd)["Which layers are odd?"]
    assert finding.answer == "7"
    assert "Layer 7: imbalance 2.72" in finding.text


def test_too_few_layers_to_call_one_odd() -> None:
    loads = [make_load(0, [10, 10]), make_load(1, [10, 10]), make_load(2, [20, 0])]
    assert "Which layers are odd?" not in findings(load=loads)


def test_nothing_measured_nothing_said() -> None:
    assert findings() == {}
