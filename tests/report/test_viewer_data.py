"""The sample of documents and what experts are known for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hand_made import WordTokenizer, random_trace

from collegium.report.viewer import viewer_data
from measure_traces import make_trace


def test_sample_takes_turns_of_the_domains_within_the_budget(tmp_path: Path) -> None:
    trace = random_trace(tmp_path / "t", layers=2, length=600)
    viewed = viewer_data(trace, budget=200 * 3 * 4)  # 4 slots a token, 3 bytes each
    documents = viewed.meta["documents"]
    assert sum(entry["length"] for entry in documents) == 200
    assert {entry["domain"] for entry in documents} == {"code", "prose", "sums"}
    assert len(viewed.columns["expert_0"]) == 200 * 2


def test_routing_of_the_sample_is_that_of_the_trace(tmp_path: Path) -> None:
    trace = random_trace(tmp_path / "t", layers=2, length=180)
    viewed = viewer_data(trace)
    at = 0
    ids = np.array(viewed.meta["ids"])[viewed.columns["token"]]
    for entry in viewed.meta["documents"]:
        rows = trace.documents() == entry["document"]
        span = slice(at, at + entry["length"])
        assert ids[span].tolist() == trace.tokens()[rows].tolist()
        for layer in viewed.meta["layers"]:
            shape = (-1, layer["slots"])
            number = layer["layer"]
            expert = viewed.columns[f"expert_{number}"].reshape(shape)[span]
            assert (expert == trace.experts(number)[rows]).all()
            weight = viewed.columns[f"weight_{number}"].reshape(shape)[span] / 127 * layer["scale"]
            assert np.abs(weight - trace.weights(number)[rows]).max() < 0.005
        at += entry["length"]


def test_experts_are_known_for_what_is_theirs_not_for_what_is_frequent(tmp_path: Path) -> None:
    # token 0 goes to both experts, token 1 only to expert 0, token 2 only to expert 1
    tokens = [0] * 20 + [1] * 5 + [2] * 5
    experts = [[0], [1]] * 10 + [[0]] * 5 + [[1]] * 5
    trace = make_trace(tmp_path / "t", {0: experts}, 3, tokens=tokens)
    viewed = viewer_data(trace)
    listed = viewed.meta["listed"]
    known = np.array(viewed.meta["ids"])[viewed.columns["known_0"]].reshape(3, listed)
    count, part = (viewed.columns[f"known_{name}_0"].reshape(3, listed) for name in ("count", "part"))
    assert known[0, 0] == 1
    assert known[1, 0] == 2
    assert count[0, :3].tolist() == [5, 10, 0]
    assert part[0, :2].tolist() == [100, 50]
    assert not count[2].any(), "a dead expert is known for nothing"


def test_layers_of_different_size_and_unused_slots(tmp_path: Path) -> None:
    experts = {0: [[0, 1], [3, 4], [2, 4]], 7: [[255], [256], [300]]}
    trace = make_trace(tmp_path / "t", experts, {0: 4, 7: 300}, top_k={0: 2, 7: 1})
    viewed = viewer_data(trace)
    assert viewed.columns["expert_0"].tolist() == [0, 1, 3, 4, 2, 4], "4 is no expert: the slot is unused"
    assert viewed.columns["expert_7"].tolist() == [255, 256, 300]


def test_text_only_with_a_tokenizer(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", {0: [[0], [1]]}, 2, tokens=[7, 3])
    assert viewer_data(trace).meta["texts"] is None
    assert viewer_data(trace, WordTokenizer()).meta["texts"] == [" w3", " seven"]


@pytest.mark.parametrize("order", [1, -1])
def test_documents_are_shown_in_reading_order(tmp_path: Path, order: int) -> None:
    tokens = np.arange(10)[::order]
    trace = make_trace(tmp_path / "t", {0: [[0]] * 10}, 2, tokens=tokens.tolist(), positions=tokens.tolist())
    assert viewer_data(trace).columns["position"].tolist() == list(range(10))
