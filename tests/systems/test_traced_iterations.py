"""Layers that route several times in a forward, in traces: what is stored, and what reads it or refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import ROWS, fresh, shaken

from collegium.errors import TraceError, UnsupportedFamilyError
from collegium.layer import moe_layers
from collegium.measure import drift, drops, load, metrics, missing_needs
from collegium.measure.affinity import coactivation
from collegium.measure.locality import local_routing_consistency
from collegium.measure.stability import routing_fluctuation
from collegium.offload.geometry import Geometry
from collegium.offload.precision.hobbit import Hobbit
from collegium.offload.simulate_passes import Passes
from collegium.report.facts import layers_in_words
from collegium.routing import Routing
from collegium.trace import LayerMeta, LayerRows, Trace, TraceMeta, TraceWriter, record, record_generate
from collegium.trace.rows import in_sequence
from collegium.trace.schema import META, column_names
from tiny import tiny_inputs

CHAIN = {"iterations": 2, "num_experts_per_tok": 2}
"""Two iterations of two experts each."""


def model_of(router: dict[str, Any]) -> Any:
    return fresh("qwen3", router, **CHAIN).eval()


def recorded(model: Any, folder: Path, length: int = 12, **settings: Any) -> tuple[Trace, list[list[Routing]]]:
    """A trace, and the routings of each layer as its routers gave them."""
    seen: list[list[Routing]] = [[] for _ in moe_layers(model)]
    for found, layer in zip(seen, moe_layers(model), strict=True):
        for gate in layer.gates:
            gate.register_forward_hook(lambda _, __, routing, found=found: found.append(routing))
    return record(model, [tiny_inputs(model, ROWS, length)], folder, **settings), seen


def written(folder: Path, experts: list[list[int]], *, iterations: int = 2, top_k: int = 4) -> Trace:
    """A trace of one layer of 8 experts and such tokens, two of each."""
    experts = [row for row in experts for _ in range(2)]
    meta = TraceMeta(
        model="test",
        family="test",
        layers=(LayerMeta(layer=0, path="mlp", num_experts=8, top_k=top_k, score="softmax", iterations=iterations),),
        data="test",
        domains=("unknown",),
        columns=column_names([0], logits=False, gate_inputs=False),
        created="2026-01-01T00:00:00+00:00",
        collegium="0",
    )
    N = len(experts)
    at = np.arange(N)
    flat = np.array([e for row in experts for e in row], np.uint8)
    rows = LayerRows(flat, np.full(len(flat), 0.25, np.float16), np.array([len(row) for row in experts]))
    zero = np.zeros(N, np.int64)
    columns = {"token": at, "sequence": zero, "document": at // 2, "position": at, "domain": zero}
    with TraceWriter(folder, meta) as writer:
        writer.add(columns, [rows])
    return Trace.open(folder)


def test_slots_are_those_of_the_iterations_one_after_another(tmp_path: Path) -> None:
    model = model_of({"weigh": {"normalise": False}})
    trace, seen = recorded(model, tmp_path / "trace")
    for layer, (first, second) in zip(trace.layers, seen, strict=True):
        assert not torch.equal(first.expert, second.expert)
        entry = trace.meta.layer(layer)
        assert (entry.top_k, entry.iterations) == (4, 2)
        expected = torch.cat([first.index_TK, second.index_TK], 1)
        assert trace.experts(layer).tolist() == expected.tolist()
        weights = torch.cat([first.weight_TK, second.weight_TK], 1).half()
        assert trace.weights(layer).tolist() == weights.tolist()
        assert trace.counts(layer).tolist() == (first.counts() + second.counts()).tolist()
        # some token asks for an expert in both iterations
        assert any(len(set(row)) < 4 for row in expected.tolist())
    assert layers_in_words(trace) == "2 (layers 0 to 1: 8 experts, 2 per token in each of 2 iterations)"


@pytest.mark.parametrize(
    "router",
    [
        {"select": {"top_p": {"threshold": 0.5}}, "weigh": {"normalise": False}},
        {"weigh": {"normalise": True}, "capacity": {"position": {"eval_capacity_factor": 0.8}}},
    ],
    ids=["uneven", "dropped"],
)
def test_tokens_of_uneven_numbers_of_experts(router: dict[str, Any], tmp_path: Path) -> None:
    trace, seen = recorded(model_of(router), tmp_path / "trace", dropped=True)
    for layer, routings in zip(trace.layers, seen, strict=True):
        for kind, kept in (("expert", True), ("dropped", False)):
            offsets, values = next(trace.iter_parts())._ids(kind, layer)
            for token in range(len(trace)):
                expected = [
                    e
                    for one in routings
                    for t, e, k in zip(
                        one.token.tolist(),
                        one.expert.tolist(),
                        [True] * len(one.expert) if one.kept is None else one.kept.tolist(),
                        strict=True,
                    )
                    if t == token and k is kept
                ]
                assert values[offsets[token] : offsets[token + 1]].tolist() == expected
        total = trace.counts(layer) + trace.dropped_counts(layer)
        assert total.tolist() == sum(one.counts("assigned") for one in routings).tolist()
    assert trace.dropped_counts().sum() > 0 or "capacity" not in router
    assert len({len(row[row < 8]) for row in trace.experts(0)}) > 1


def test_one_routing_is_the_record_itself() -> None:
    routing = Routing.from_topk(torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2), 4, full=True)
    assert in_sequence([routing]) is routing


def test_generated_tokens_are_traced_too(tmp_path: Path) -> None:
    model = shaken("qwen3", "chain_of_experts")
    prompts = [tiny_inputs(model, ROWS, 5)]
    trace = record_generate(model, prompts, tmp_path / "trace", max_new_tokens=4, eos_token_id=None)
    assert len(trace) == ROWS * 8  # the last token is not fed again
    again = record(model, [{"input_ids": _texts(trace)}], tmp_path / "again")
    order = np.lexsort((trace.column("position"), trace.column("sequence")))
    for layer in trace.layers:
        assert trace.experts(layer)[order].tolist() == again.experts(layer).tolist()


def _texts(trace: Trace) -> torch.Tensor:
    order = np.lexsort((trace.column("position"), trace.column("sequence")))
    return torch.from_numpy(trace.tokens()[order].astype(np.int64).reshape(ROWS, -1))


def test_a_recording_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    model = shaken("qwen3", "chain_of_experts")
    batches = [tiny_inputs(model, 1, 12, seed=seed) for seed in range(3)]
    whole = record(model, batches, tmp_path / "whole")
    record(model, batches, tmp_path / "part", max_tokens=14)
    resumed = record(model, batches, tmp_path / "part", resume=True)
    assert resumed.experts(1).tolist() == whole.experts(1).tolist()


def test_the_meta_says_it_only_where_it_matters(tmp_path: Path) -> None:
    for name, system in (("chain", "chain_of_experts"), ("plain", "global_batch")):
        record(shaken("qwen3", system), [tiny_inputs(shaken("qwen3", system))], tmp_path / name)
    layers = {name: json.loads((tmp_path / name / META).read_text())["layers"] for name in ("chain", "plain")}
    assert [entry["iterations"] for entry in layers["chain"]] == [2, 2]
    # readers of the first version refuse a field they do not know
    assert all(set(entry) == {"layer", "path", "num_experts", "top_k", "score"} for entry in layers["plain"])
    assert [entry.iterations for entry in Trace.open(tmp_path / "plain").meta.layers] == [1, 1]


def test_metas_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="top_k 3 must be a multiple of the 2 iterations"):
        LayerMeta(layer=0, path="mlp", num_experts=8, top_k=3, score="softmax", iterations=2)
    layer = LayerMeta(layer=0, path="mlp", num_experts=8, top_k=4, score="softmax", iterations=2)
    for optional in ({"logits": True, "gate_inputs": False}, {"logits": False, "gate_inputs": True}):
        with pytest.raises(ValueError, match="logits and gate inputs are not stored"):
            TraceMeta(
                model="test",
                family="test",
                layers=(layer,),
                data="test",
                domains=("unknown",),
                columns=column_names([0], **optional),
                created="",
                collegium="0",
            )


@pytest.mark.parametrize("settings", [{"logits": True}, {"gate_inputs": 0.5}], ids=str)
def test_what_is_of_one_routing_is_not_recorded(settings: dict[str, Any], tmp_path: Path) -> None:
    model = shaken("qwen3", "chain_of_experts")
    with pytest.raises(UnsupportedFamilyError, match=r"layers\.0\.mlp' routes 2 times.*record without them"):
        record(model, [tiny_inputs(model)], tmp_path / "trace", **settings)
    assert not (tmp_path / "trace").exists()


# ---- readers ---------------------------------------------------------------------------------------------------------

TOKENS = [[0, 1, 0, 2], [3, 1, 3, 1], [4, 5, 6, 7], [0, 1, 2]]


def test_metrics_that_count_assignments_count_all(tmp_path: Path) -> None:
    trace = written(tmp_path / "trace", TOKENS)
    counts = np.bincount([e for row in TOKENS for e in row], minlength=8) * 2
    (found,) = load(trace)
    assert found.counts.tolist() == counts.tolist()
    assert found.max_violation.value == pytest.approx(counts.max() / counts.mean() - 1)
    (moved,) = drift(trace, windows=1)
    assert moved.share[0].tolist() == pytest.approx((counts / counts.sum()).tolist())
    (lost,) = drops(trace, bins=1)
    assert lost.overall.value == pytest.approx(1 / 16)  # one token of four has three of four slots


def test_an_expert_more_often_than_there_are_iterations_is_refused(tmp_path: Path) -> None:
    trace = written(tmp_path / "trace", [[0, 1, 2, 3], [5, 1, 5, 5]])
    with pytest.raises(TraceError, match=r"row 2 lists an expert of layer 0 more than 2 times.*\[5, 1, 5, 5\]"):
        load(trace)


def test_every_other_metric_refuses_in_words(tmp_path: Path) -> None:
    trace = written(tmp_path / "trace", TOKENS)
    plain = written(tmp_path / "plain", [[0, 1, 2, 3]] * 4, iterations=1)
    able = {one.name for one in metrics() if one.iterated}
    assert able == {"load", "drift", "drops", "domains", "early-routing"}
    for one in metrics():
        assert (missing_needs(one, trace) or "").startswith("reads one routing") == (one.name not in able)
        assert "reads one routing" not in (missing_needs(one, plain) or "")
        if one.name not in able:
            with pytest.raises(TraceError, match=f"metric '{one.name}' reads one routing.*layer 0.*routes 2 times"):
                one.function(trace, trace)
    for call in (coactivation, local_routing_consistency):
        with pytest.raises(TraceError, match="reads one routing"):
            call(trace)
    with pytest.raises(TraceError, match="reads one routing"):
        routing_fluctuation(plain, trace)


@pytest.mark.parametrize(
    "read",
    [lambda trace: Geometry.of_trace(trace.meta), Passes, lambda trace: Hobbit.of_trace(trace, (0.5, 0.5))],
    ids=["geometry", "simulation", "hobbit"],
)
def test_offloading_refuses_in_words(read: Callable[[Trace], Any], tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="layer 0 of this trace routes 2 times"):
        read(written(tmp_path / "trace", TOKENS))
    read(written(tmp_path / "plain", [[0, 1, 2, 3]] * 4, iterations=1))
