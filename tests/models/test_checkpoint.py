"""Checkpoint headers: read without the weights, every lie of a header refused by name."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from collegium.errors import CheckpointError, NonFiniteError, RemoteCodeError
from collegium.models.checkpoint import BITS, open_checkpoint, read_header, refuse_remote_code

Entries = dict[str, Any]


def write_file(path: Path, entries: Entries, data: int | bytes, header: bytes | None = None) -> Path:
    """A safetensors file with any header, and `data` bytes (a number makes a file with a hole)."""
    raw = json.dumps(entries).encode() if header is None else header
    with open(path, "wb") as handle:
        handle.write(len(raw).to_bytes(8, "little") + raw)
        if isinstance(data, bytes):
            handle.write(data)
        else:
            handle.truncate(8 + len(raw) + data)
    return path


def entry(begin: int, end: int, dtype: str = "F32", shape: list[int] | None = None) -> Entries:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.fixture
def sharded(tmp_path):
    """Two shards, an index and a config; tensors a, b in the first and c in the second."""
    torch.manual_seed(0)
    tensors = [{"a": torch.randn(4, 3), "b": torch.randn(5).to(torch.bfloat16)}, {"c": torch.randn(2, 2)}]
    weight_map = {}
    for number, shard in enumerate(tensors, 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(shard, tmp_path / name)
        weight_map |= dict.fromkeys(shard, name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe", "time_step_limit": float("inf")}))
    return tmp_path


def test_opens_shards_through_their_headers(sharded):
    checkpoint = open_checkpoint(sharded)
    checkpoint.verify()
    checkpoint.verify_finite()
    assert sorted(checkpoint.tensors) == ["a", "b", "c"]
    b = checkpoint.tensors["b"]
    assert (b.file, b.dtype, b.shape, b.nbytes, b.numel) == ("model-00001-of-00002.safetensors", "BF16", (5,), 10, 5)
    c = checkpoint.tensors["c"]
    content = (sharded / c.file).read_bytes()[c.offset : c.offset + c.nbytes]
    torch.manual_seed(0)
    torch.randn(4, 3), torch.randn(5)
    assert np.frombuffer(content, np.float32).tolist() == torch.randn(2, 2).reshape(-1).tolist()


def test_missing_shards_are_listed_not_raised(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.missing == {"model-00002-of-00002.safetensors": ("c",)}
    for use in (checkpoint.verify, checkpoint.verify_finite, lambda: checkpoint.fingerprint):
        with pytest.raises(CheckpointError, match=r"1 shards are missing: model-00002-of-00002\.safetensors"):
            use()


def test_without_an_index_the_names_tell_how_many_shards_there_are(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / "model-00001-of-00002.safetensors").unlink()
    checkpoint = open_checkpoint(sharded)
    assert list(checkpoint.tensors) == ["c"]
    assert checkpoint.missing == {"model-00001-of-00002.safetensors": ()}


def test_seven_hundred_gigabytes_open_in_a_second(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    shards, each, rows = 70, 250, 40_000_000
    for number in range(1, shards + 1):
        entries = {f"layers.{number}.{i}": entry(i * rows, (i + 1) * rows) for i in range(each)}
        write_file(tmp_path / f"model-{number:05d}-of-{shards:05d}.safetensors", entries, each * rows)
    start = time.perf_counter()
    checkpoint = open_checkpoint(tmp_path)
    fingerprint = checkpoint.fingerprint
    seconds = time.perf_counter() - start
    assert sum(info.nbytes for info in checkpoint.tensors.values()) == 700_000_000_000
    assert len(fingerprint) == 32
    assert seconds < 5, "reading the weights would take minutes"


def test_fingerprint_tells_models_apart_and_not_shardings(sharded, tmp_path_factory):
    before = open_checkpoint(sharded).fingerprint
    torch.manual_seed(0)
    tensors = {"a": torch.randn(4, 3), "b": torch.randn(5).to(torch.bfloat16), "c": torch.randn(2, 2)}

    def fingerprint(config: dict[str, Any] | None = None) -> str:
        folder = tmp_path_factory.mktemp("other")
        save_file(tensors, folder / "model.safetensors")
        raw = json.loads((sharded / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps(raw))
        return open_checkpoint(folder).fingerprint

    assert fingerprint() == before
    assert fingerprint({"transformers_version": "9.9"}) == before
    assert fingerprint({"num_experts_per_tok": 3}) != before
    tensors["c"][0, 0] += 1
    assert fingerprint() != before


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        *itertools.product(
            [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2],
            [float("nan"), float("inf"), -float("inf")],
        ),
        (torch.float8_e4m3fn, float("nan")),  # this type has no infinity
    ],
)
def test_non_finite_weights_are_named(tmp_path, dtype, bad):
    torch.manual_seed(0)
    good = torch.randn(1000, dtype=torch.float64).to(dtype)
    limits = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=torch.float64).to(dtype)
    (tmp_path / "config.json").write_text("{}")
    save_file({"ids": torch.arange(9), "good": good, "limits": limits}, tmp_path / "model.safetensors")
    open_checkpoint(tmp_path).verify_finite()
    damaged = good.double()
    damaged[321] = bad
    save_file({"good": good, "damaged": damaged.to(dtype).clone()}, tmp_path / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"tensor 'damaged' .* first at flat position 321"):
        open_checkpoint(tmp_path).verify_finite()


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("collegium.models.checkpoint._CHUNK", 64)
    (tmp_path / "config.json").write_text("{}")
    x = torch.zeros(1000)
    x[777] = float("nan")
    save_file({"x": x}, tmp_path / "model.safetensors")
    read: list[int] = []
    with pytest.raises(NonFiniteError, match="position 777"):
        open_checkpoint(tmp_path).verify_finite(read.append)
    assert set(read) == {64}


@pytest.mark.parametrize(
    ("entries", "size", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' overlaps the tensor before it"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "'b' leaves a hole before it"),
        ({"a": entry(4, 8)}, 8, "'a' leaves a hole before it"),
        ({"a": entry(0, 8)}, 4, "truncated: its header describes"),
        ({"a": entry(0, 8)}, 12, "4 bytes after the last tensor"),
        ({"a": entry(0, 8, shape=[3])}, 8, "takes 96 bits, its data_offsets span 8 bytes"),
        ({"a": entry(0, 8, dtype="F31")}, 8, "dtype 'F31' is none of"),
        ({"a": entry(0, 8, shape=[-2])}, 8, r"shape \[-2\] is not a list of sizes"),
        ({"a": entry(0, 8, shape=[True, 2])}, 8, "is not a list of sizes"),
        ({"a": entry(0, 8, shape=[1] * 65)}, 8, "is not a list of sizes"),
        ({"a": entry(0, 8, shape=[1 << 62] * 64)}, 8, "its data_offsets span 8"),
        ({"a": {**entry(0, 8), "data_offsets": [8, 0]}}, 8, "are not \\[begin, end\\]"),
        ({"a": {**entry(0, 8), "data_offsets": [0, 8, 8]}}, 8, "are not \\[begin, end\\]"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "must hold exactly dtype, shape and data_offsets"),
        ({"a": 5}, 0, "must hold exactly dtype, shape and data_offsets"),
        ({"__metadata__": {"step": 3}}, 0, "'__metadata__' must map strings to strings"),
        ({"a": entry(0, 3, dtype="F4", shape=[5])}, 3, "takes 20 bits"),
    ],
)
def test_lying_headers_are_refused(tmp_path, entries, size, message):
    path = write_file(tmp_path / "x.safetensors", entries, size)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "must be a JSON object"),
        (b'{"a": ', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "a key is given twice"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_headers_are_refused(tmp_path, header, message):
    with pytest.raises(CheckpointError, match=message):
        read_header(write_file(tmp_path / "x.safetensors", {}, 0, header))


def test_header_length_is_limited_by_the_file_and_by_sense(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match="truncated: 20 bytes hold no header"):
        read_header(path)
    path.write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="truncated: 3 bytes"):
        read_header(path)
    with open(path, "wb") as handle:
        handle.write((200_000_000).to_bytes(8, "little"))
        handle.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="over the limit"):
        read_header(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bit_flip_in_a_header_is_an_error_or_a_valid_table(sharded, data):
    good = (sharded / "model-00001-of-00002.safetensors").read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    content = bytearray(good)
    content[data.draw(st.integers(0, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = sharded / "flipped.safetensors"
    path.write_bytes(content)
    try:
        table = read_header(path)
    except CheckpointError:
        return
    for info in table.values():
        assert info.offset + info.nbytes <= len(content)
        assert info.numel * BITS[info.dtype] == info.nbytes * 8


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../../secret.safetensors"}}, "mapped to '../../secret.safetensors'"),
        ({"weight_map": {"a": "/etc/passwd"}}, "mapped to '/etc/passwd'"),
        ({"weight_map": {"a": 7}}, "mapped to 7"),
        ({"weight_map": []}, "field 'weight_map' must map"),
        ({}, "field 'weight_map' must map"),
        ({"weight_map": {"z": "model-00001-of-00002.safetensors"}}, "the index promises 1 tensors it lacks, first 'z'"),
    ],
)
def test_wrong_index_is_refused(sharded, index, message):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    save_file({"c": torch.zeros(2, 2), "a": torch.zeros(1)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'a' is also in model-00001"):
        open_checkpoint(sharded)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder; give the path of a model folder"):
        open_checkpoint(tmp_path / "org/model")
    with pytest.raises(CheckpointError, match=r"config\.json.*is this a model folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="must be a JSON object, not list"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds a config but no"):
        open_checkpoint(tmp_path).verify()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickle files"):
        open_checkpoint(tmp_path)


def test_remote_code_is_refused_only_where_it_would_be_needed():
    code = {"AutoModelForCausalLM": "modeling_evil.EvilModel"}
    with pytest.raises(RemoteCodeError, match=r"'evil' is unknown to transformers .*modeling_evil"):
        refuse_remote_code({"model_type": "evil", "auto_map": code})
    refuse_remote_code({"model_type": "deepseek_v3", "auto_map": code})
    refuse_remote_code({"model_type": "olmoe"})


def test_infinity_in_a_config_comes_back_as_transformers_wrote_it(tmp_path):
    from transformers import NemotronHConfig

    NemotronHConfig().save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).config["time_step_limit"][1] == float("inf")
