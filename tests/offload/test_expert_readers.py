"""Reading a plain checkpoint gives the records that packing writes; the queue keeps its order and its promises."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from storing import experts, model_of, oracle, record, written

from collegium.errors import CheckpointError, ConfigError, UnsupportedFamilyError
from collegium.offload.store import DEMAND, PREFETCH, ReadQueue, Ticket, aligned, open_plain, open_store, pack
from tiny import SEAM, families, seam_model_type

WRAPPED = ["aria", "ernie4_5_vl_moe", "gemma4", "glm4v_moe", "glm5_next", "kimi_k25", "mistral_large4", "qwen3_vl_moe"]

NO_LANGUAGE_MODEL = {
    "deepseek_ocr2_text", "diffusion_gemma_text", "ernie4_5_vl_moe_text", "glm4v_moe_text", "glm5_next_text",
    "mistral_large4_text", "muse_spark_text", "openai_privacy_filter", "qwen3_omni_moe_text",
    "qwen3_omni_moe_talker_text", "qwen3_vl_moe_text", "unlimited_ocr_text",
}  # fmt: skip
"""Text parts that transformers does not run alone."""


def compare(folder: Path, out: Path, bits: int) -> None:
    """Every record of a plain checkpoint is the packed one, and what transformers loads."""
    packed = pack(folder, out, bits=(bits,))
    plain = open_plain(folder)
    assert plain.layers == packed.layers
    assert plain.fingerprint == packed.fingerprint
    assert plain.checkpoint.tensors.keys() - plain.expert_tensors == packed.checkpoint.tensors.keys()
    truth = oracle(folder, torch.bfloat16 if bits == 16 else torch.float32)
    for layer, expert in experts(plain):
        one, found = plain.layers[layer], record(plain, layer, expert, bits)
        assert torch.equal(found, record(packed, layer, expert, bits))
        assert torch.equal(found, written(one.layouts[bits], truth[one.path][expert]))
    plain.close()
    packed.close()


@pytest.mark.parametrize(("family", "experts_class"), SEAM, ids=[f"{f}-{c}" for f, c in SEAM])
def test_every_family_behind_the_seam_reads_as_it_packs(family: str, experts_class: str, tmp_path: Path) -> None:
    model_type = seam_model_type(family, experts_class)
    if model_type in NO_LANGUAGE_MODEL:
        with pytest.raises(UnsupportedFamilyError, match="no language-model class"):
            open_plain(model_of(model_type, tmp_path))
        return
    compare(model_of(model_type, tmp_path, fused=model_type == "inkling2_text"), tmp_path / "store", 16)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model_type", families("gpt_oss", "mixtral", "nemotron_h", "qwen3_vl_moe"))
def test_both_forms_on_disk_and_both_dtypes(model_type: str, dtype: torch.dtype, fused: bool, tmp_path: Path) -> None:
    compare(model_of(model_type, tmp_path, dtype, fused=fused), tmp_path / "store", 16 if dtype.itemsize == 2 else 32)


@pytest.mark.parametrize("model_type", families(*WRAPPED))
def test_multimodal_models(model_type: str, tmp_path: Path) -> None:
    compare(model_of(model_type, tmp_path, fused=model_type == "ernie4_5_vl_moe"), tmp_path / "store", 16)


def test_checkpoints_with_experts_the_other_way_round(tmp_path: Path) -> None:
    """Qwen3-VL-MoE is found with matrices ``[in, out]`` and ``[out, in]``; transformers tells by the shape."""
    folder = model_of("qwen3_vl_moe", tmp_path, text_config={"moe_intermediate_size": 24})
    first = oracle(folder, torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    turned = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor for name, tensor in tensors.items()
    }
    save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
    assert {name for name in turned if turned[name].shape != tensors[name].shape}
    plain = open_plain(folder)
    for layer, expert in experts(plain):
        one = plain.layers[layer]
        assert torch.equal(record(plain, layer, expert, 16), written(one.layouts[16], first[one.path][expert]))


def test_experts_over_several_shards_and_at_odd_places(tmp_path: Path) -> None:
    folder = model_of("olmoe", tmp_path)
    pack(folder, tmp_path / "store")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {f"model-{i:05d}-of-00005.safetensors": sorted(tensors)[i - 1 :: 5] for i in range(1, 6)}
    for file, names in files.items():
        # one byte in front puts all that follows at odd places
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        shift(folder / file)
    index = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    plain, packed = open_plain(folder), open_store(tmp_path / "store")
    assert all(region.offset % 2 for reads in plain._reads[0] for read in reads for region in read.regions)
    for layer, expert in experts(plain):
        assert torch.equal(record(plain, layer, expert, 16), record(packed, layer, expert, 16))


def shift(path: Path) -> None:
    """Make a header one byte longer."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])


def test_what_takes_more_than_moving_bytes_is_refused_with_a_way_out(tmp_path: Path) -> None:
    for family, dtype, message in (
        ("ernie4_5_vl_moe", torch.bfloat16, "taken apart.*collegium pack"),
        ("qwen3_moe", torch.float16, "as F16; only bfloat16 or float32.*collegium pack"),
    ):
        with pytest.raises(UnsupportedFamilyError, match=message):
            open_plain(model_of(family, tmp_path, dtype))
    with pytest.raises(UnsupportedFamilyError, match="'llama4_text' cannot be run"):
        open_plain(model_of("llama4_text", tmp_path))


@pytest.mark.parametrize("model_type", families("inkling2_text"))
def test_interleaving_is_refused(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFamilyError, match=r"Interleave.*collegium pack"):
        open_plain(model_of(model_type, tmp_path))


@pytest.mark.parametrize("how", ["missing", "wrong shape"])
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, how: str) -> None:
    folder = model_of("qwen3_moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name][1:].contiguous()
    if how == "missing":
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts"):
        open_plain(folder)


def test_a_plain_file_that_is_cut_off_while_it_is_open(tmp_path: Path) -> None:
    folder = model_of("qwen3_moe", tmp_path)
    plain = open_plain(folder)
    reads = {key: plain._reads[key[0]][key[1]] for key in experts(plain)}
    end = {key: max(read.regions[-1].offset + read.regions[-1].nbytes for read in some) for key, some in reads.items()}
    cut = sorted(end.values())[8]
    os.truncate(folder / "model.safetensors", cut)
    failed = set()
    for layer, expert in experts(plain):
        try:
            record(plain, layer, expert, 16)
        except CheckpointError as error:
            assert f"expert {expert} of layer {layer}" in str(error)  # noqa: PT017
            failed.add((layer, expert))
    assert failed == {key for key, value in end.items() if value > cut}
    assert 0 < len(failed) < len(end)


class Slow:
    """A source that reads when it is told to, and fails for expert 13."""

    def __init__(self) -> None:
        self.order: list[tuple[int, int]] = []
        self.gate = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def read(self, layer: int, expert: int, bits: int, into: np.ndarray[Any, Any]) -> None:
        self.order.append((layer, expert))
        self.begun.release()
        self.gate.acquire()
        if expert == 13:
            raise CheckpointError("the disk has a hole")
        into[:] = expert


def started(threads: int = 1) -> tuple[Slow, ReadQueue]:
    source: Any = Slow()
    return source, ReadQueue(source, threads)


def test_demand_goes_before_prefetch_and_within_each_first_comes_first() -> None:
    source, queue = started()
    tickets = [queue.submit(9, 9, 8, aligned(8))]
    source.begun.acquire()  # the only thread is busy now
    asked = [(0, PREFETCH), (1, PREFETCH), (2, DEMAND), (3, PREFETCH), (4, DEMAND), (5, PREFETCH)]
    tickets += [queue.submit(0, expert, 8, aligned(8), priority) for expert, priority in asked]
    assert queue.promote(tickets[4])  # expert 3: somebody waits for it now
    assert tickets[4].priority == DEMAND
    assert not queue.promote(tickets[3])  # a demand is one already
    assert not queue.promote(tickets[0])  # under way
    assert queue.cancel(tickets[2])  # expert 1
    assert not queue.cancel(tickets[2])
    assert tickets[2].cancelled
    assert tickets[2].done.is_set()
    assert not queue.cancel(tickets[0])
    assert (queue.counters().waiting, queue.counters().reading) == (5, 1)
    source.gate.release(10)
    assert all(ticket.wait(10) for ticket in tickets)
    assert [expert for _, expert in source.order] == [9, 2, 4, 3, 0, 5]
    found = queue.counters()
    assert (found.demand, found.prefetch, found.promoted, found.cancelled, found.failed) == (4, 2, 1, 1, 0)
    assert (found.bytes, found.waiting, found.reading) == (6 * 8, 0, 0)
    assert found.seconds >= tickets[0].seconds > 0
    queue.close()


def test_an_error_is_kept_in_its_ticket_and_the_thread_goes_on() -> None:
    source, queue = started()
    source.gate.release(9)
    seen: list[tuple[int, bool, bool]] = []

    def note(ticket: Ticket) -> None:
        seen.append((ticket.expert, ticket.error is None, ticket.done.is_set()))
        if ticket.expert == 2:
            raise ValueError("a fault of who asked")

    tickets = [queue.submit(0, expert, 8, aligned(8), DEMAND, note) for expert in (1, 13, 2, 3)]
    assert all(ticket.wait(10) for ticket in tickets)
    assert [type(ticket.error) for ticket in tickets] == [type(None), CheckpointError, ValueError, type(None)]
    assert seen == [(1, True, False), (13, False, False), (2, True, False), (3, True, False)]
    assert bytes(tickets[3].into) == bytes([3] * 8)
    assert queue.counters().failed == 2
    queue.close()


def test_closing_ends_everything() -> None:
    source, queue = started(2)
    called: list[int] = []
    tickets = [
        queue.submit(0, expert, 8, aligned(8), PREFETCH, lambda ticket: called.append(ticket.expert))
        for expert in range(5)
    ]
    source.begun.acquire()
    source.begun.acquire()
    closing = threading.Thread(target=queue.close)
    closing.start()
    assert tickets[4].wait(10)
    assert closing.is_alive()  # two reads are under way
    source.gate.release(2)
    closing.join(10)
    assert not closing.is_alive()
    assert sorted(called) == [0, 1, 2, 3, 4]
    assert [ticket.error is None for ticket in tickets] == [True, True, False, False, False]
    assert "closed before" in str(tickets[2].error)
    with pytest.raises(ConfigError, match="is closed"):
        queue.submit(0, 0, 8, aligned(8))
    queue.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("expert-reader")]


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="0 threads"):
        started(0)
    _, queue = started()
    with pytest.raises(ConfigError, match="not 2"):
        queue.submit(0, 0, 8, aligned(8), 2)
    queue.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("dpxw"), st.integers(0, 30)), max_size=40), st.integers(1, 4))
def test_every_ticket_ends_exactly_once(steps: list[tuple[str, int]], threads: int) -> None:
    """Demand, prefetch, promote and cancel in any order, against threads that read meanwhile."""
    source, queue = started(threads)
    source.gate.release(100)
    ended: list[int] = []
    tickets: list[Ticket] = []
    for kind, value in steps:
        if kind in "dp":
            priority = DEMAND if kind == "d" else PREFETCH
            number = len(tickets)
            tickets.append(
                queue.submit(0, value, 8, aligned(8), priority, lambda ticket, number=number: ended.append(number))  # type: ignore[misc]
            )
        elif tickets:
            act = queue.promote if kind == "w" else queue.cancel
            act(tickets[value % len(tickets)])
    assert all(ticket.wait(10) for ticket in tickets)
    queue.close()
    gone = [number for number, ticket in enumerate(tickets) if ticket.cancelled]
    assert sorted([*ended, *gone]) == list(range(len(tickets)))
    for ticket in tickets:
        assert ticket.cancelled or (ticket.error is not None) == (ticket.expert == 13)
    found = queue.counters()
    assert found.demand + found.prefetch == len(tickets) - len(gone) == len(source.order)
    assert (found.waiting, found.reading, found.cancelled) == (0, 0, len(gone))


def test_a_real_source_under_many_threads(tmp_path: Path) -> None:
    store = pack(model_of("qwen3_moe", tmp_path), tmp_path / "store", bits=(16, 8))
    expected = {(i, e, b): record(store, i, e, b) for i, e in experts(store) for b in (16, 8)}
    queue = ReadQueue(store, 4)
    tickets = [
        (key, queue.submit(*key, aligned(len(expected[key])), number % 2))
        for number, key in enumerate(list(expected) * 8)
    ]
    start = time.monotonic()
    for key, ticket in tickets:
        assert ticket.wait(10)
        assert ticket.error is None
        assert torch.equal(torch.from_numpy(ticket.into), expected[key])
    assert time.monotonic() - start < 10
    assert queue.counters().bytes == sum(len(expected[key]) for key, _ in tickets)
    queue.close()
