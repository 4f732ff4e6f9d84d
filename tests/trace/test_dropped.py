"""The optional column of assignments that a capacity limit dropped: written, read, counted, recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import make_meta, make_rows, write

from collegium.errors import TraceError
from collegium.sites import Order, tap
from collegium.trace import LayerRows, Trace, TraceWriter, record
from collegium.trace.schema import column_names, read_meta
from tiny import tiny_inputs, tiny_model


def meta_with_drops():
    return make_meta(columns=column_names([1, 3], logits=False, gate_inputs=False, dropped=True))


def test_what_was_dropped_comes_back(tmp_path: Path) -> None:
    tokens, (first, second) = make_rows(6)
    lengths = np.array([0, 2, 0, 0, 1, 1])
    first = replace(first, dropped=np.array([7, 0, 7, 3]), dropped_lengths=lengths)
    with TraceWriter(tmp_path, meta_with_drops(), part_rows=4) as writer:
        writer.add(tokens, [first, second])  # nothing was dropped in the second layer
        writer.add(tokens, [LayerRows(second.expert[:12] % 8, second.weight[:12]), second])
    trace = Trace.open(tmp_path)
    assert trace.meta.has("dropped")
    found = [part.dropped(1) for part in trace.iter_parts()]
    assert np.concatenate([np.diff(offsets) for offsets, _ in found]).tolist() == [*lengths, *[0] * 6]
    assert np.concatenate([expert for _, expert in found]).tolist() == [7, 0, 7, 3]
    assert found[0][1].dtype == np.uint8
    assert trace.dropped_counts(1).tolist() == [1, 0, 0, 1, 0, 0, 0, 2]
    assert trace.dropped_counts().shape == (2, 300)
    assert trace.dropped_counts(3).sum() == 0
    by = trace.dropped_counts(1, by="document")  # documents of 8 tokens: all of them in the first
    assert by.tolist() == [trace.dropped_counts(1).tolist()]
    assert trace.counts(1).sum() == 24  # what was dropped does not count as carried out


def test_a_trace_without_the_column_says_so(tmp_path: Path) -> None:
    write(tmp_path)
    trace = Trace.open(tmp_path)
    assert not trace.meta.has("dropped")
    with pytest.raises(TraceError, match="--dropped"):
        trace.dropped_counts()
    with pytest.raises(TraceError, match="without dropped assignments"):
        next(trace.iter_parts()).dropped(1)


def test_a_dropped_id_that_is_no_expert_is_refused(tmp_path: Path) -> None:
    tokens, (first, second) = make_rows(2)
    first = replace(first, dropped=np.array([8]), dropped_lengths=np.array([1, 0]))
    with TraceWriter(tmp_path, meta_with_drops()) as writer:
        writer.add(tokens, [first, second])
    with pytest.raises(TraceError, match="'dropped_1' holds expert 8 of only 8"):
        Trace.open(tmp_path).dropped_counts(1)


class Capacity:
    """Drops each expert's assignments beyond the first `limit` of a forward."""

    order = Order.TOP_K

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.lost: dict[int, list[tuple[int, int]]] = {}

    def __call__(self, site, x, routing):
        place = torch.zeros_like(routing.expert)
        for e in range(routing.num_experts):
            mine = routing.expert == e
            place[mine] = torch.arange(int(mine.sum()))
        kept = place < self.limit
        pairs = zip(routing.token[~kept].tolist(), routing.expert[~kept].tolist(), strict=True)
        self.lost.setdefault(site.layer, []).extend(pairs)
        return replace(routing, kept=kept)


@pytest.mark.parametrize("masked", [False, True])
def test_recording_keeps_carried_out_and_dropped_apart(tmp_path: Path, masked: bool) -> None:
    model, capacity = tiny_model("qwen3_moe"), Capacity(4)
    ids = tiny_inputs(model)["input_ids"]
    mask = torch.ones_like(ids)
    if masked:
        mask[1, 7:] = 0
    with tap(model, capacity):
        trace = record(model, [{"input_ids": ids, "attention_mask": mask}], tmp_path, dropped=True)
    part = next(trace.iter_parts())
    rows = np.flatnonzero(mask.reshape(-1).numpy())
    for layer in trace.layers:
        offsets, expert = part.dropped(layer)
        token = rows[np.repeat(np.arange(len(part)), np.diff(offsets))]
        stored = [pair for pair in capacity.lost[layer] if pair[0] in rows]
        assert sorted(zip(token.tolist(), expert.tolist(), strict=True)) == sorted(stored)
        assert stored
        assert trace.counts(layer).sum() + trace.dropped_counts(layer).sum() == 2 * len(trace)
        assert trace.counts(layer).max() <= 4


def test_a_model_that_never_drops_gives_empty_lists(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    trace = record(model, [tiny_inputs(model)], tmp_path, dropped=True)
    assert read_meta(tmp_path).has("dropped")
    assert trace.dropped_counts().sum() == 0
    assert len(trace) == 24
