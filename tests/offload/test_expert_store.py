"""Reading a store: records, damage of every kind, threads, and nothing left in the page cache."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import shutil
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from storing import WIDE, experts, model_of, record
from test_pack_store import flip

from collegium.errors import CheckpointError, ConfigError
from collegium.offload.store import ExpertStore, aligned, direct, open_source, open_store, pack


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stores")
    return pack(model_of("qwen3_moe", root, **WIDE), root / "store", bits=(16, 8, 4)).folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "store"))


def resident(path: Path) -> int:
    """Pages of a file in the page cache; skips the test where that cannot be seen."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mincore"):
        pytest.skip("this C library has no mincore")
    pages = -(-path.stat().st_size // mmap.PAGESIZE)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as view:
        array = np.frombuffer(view, np.uint8)
        seen = (ctypes.c_ubyte * pages)()
        failed = libc.mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(path.stat().st_size), seen)
        del array
    if failed:
        pytest.skip("mincore is refused here")
    return sum(value & 1 for value in seen)


def evict(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("refuses", [False, True])
def test_nothing_stays_in_the_page_cache(folder: Path, refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(folder.glob("experts-*"))
    for file in files:
        evict(file)
        if resident(file):
            pytest.skip("this file system keeps pages that it was asked to drop")
    files[0].read_bytes()
    if not resident(files[0]):
        pytest.skip("this file system caches nothing that can be seen")
    evict(files[0])
    if refuses:
        refuse_direct(monkeypatch)
        with pytest.warns(UserWarning, match="no direct reads"):
            store = open_store(folder)
    else:
        store = open_store(folder)
    assert store.direct != refuses
    for layer, expert in experts(store):
        for bits in store.meta.bits:
            record(store, layer, expert, bits)
    assert [resident(file) for file in files] == [0] * len(files)


def refuse_direct(patch: pytest.MonkeyPatch) -> None:
    """Make a file system that has no direct reads."""
    opened = os.open

    def refuse(path: Any, flags: int, *mode: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *mode)

    patch.setattr(direct.os, "open", refuse)


def test_packing_leaves_no_page_either(made: Path, tmp_path: Path) -> None:
    store = pack(made.parent / "qwen3_moe-model", tmp_path / "store")
    files = sorted(store.folder.glob("experts-*"))
    files[0].read_bytes()
    if not resident(files[0]):
        pytest.skip("this file system caches nothing that can be seen")
    assert resident(files[1]) == 0


def test_a_file_system_without_direct_reads_reads_the_same(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(made)
    refuse_direct(monkeypatch)
    with pytest.warns(UserWarning, match="no direct reads") as said:
        buffered = open_store(made)
    assert len(said) == 1
    assert (store.direct, buffered.direct) in {(True, False), (False, False)}
    for layer, expert in experts(store):
        assert torch.equal(record(store, layer, expert, 8), record(buffered, layer, expert, 8))


def test_a_flipped_bit_is_found_on_the_first_read(folder: Path) -> None:
    clean = open_store(folder)
    nbytes = clean.layers[1].layouts[8].nbytes
    flip(folder / "experts-00001-8.bin", 3 * nbytes + nbytes - 1)  # in the padding, even
    store = open_store(folder)
    for _ in range(2):  # and it is not taken for verified then
        with pytest.raises(CheckpointError, match=r"experts-00001-8\.bin: expert 3 of layer 1 .*checksum.*damaged"):
            record(store, 1, 3, 8)
    record(store, 1, 2, 8)
    record(store, 1, 3, 16)
    record(store, 0, 3, 8)


def test_a_file_that_is_changed_while_it_is_open_is_verified_again(folder: Path) -> None:
    store = open_store(folder)
    before = record(store, 0, 3, 4)
    flip(folder / "experts-00000-4.bin", 3 * len(before) + 5)
    with pytest.raises(CheckpointError, match="expert 3 of layer 0"):
        record(store, 0, 3, 4)
    record(store, 0, 2, 4)
    flip(folder / "experts-00000-4.bin", 3 * len(before) + 5)
    assert torch.equal(record(store, 0, 3, 4), before)


@pytest.mark.parametrize("cut", [0, 1, 4096, 5000])
def test_a_file_that_is_cut_off_while_it_is_open_fails_for_what_is_gone(folder: Path, cut: int) -> None:
    store = open_store(folder)
    nbytes = store.layers[0].layouts[16].nbytes
    os.truncate(folder / "experts-00000-16.bin", 5 * nbytes + cut)
    for expert in range(8):
        if expert < 5 or (expert + 1) * nbytes <= 5 * nbytes + cut:
            record(store, 0, expert, 16)
        else:
            with pytest.raises(CheckpointError, match=f"expert {expert} of layer 0 .* cut off"):
                record(store, 0, expert, 16)
    record(store, 1, 7, 16)


def test_an_error_of_the_disk_names_the_expert(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(made)

    def broken(*arguments: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(direct.os, "preadv", broken)
        with pytest.raises(CheckpointError, match=r"could not read expert 1 of layer 0 .*Input/output error"):
            record(store, 0, 1, 8)
    record(store, 0, 1, 8)


def test_reads_that_come_in_pieces_are_put_together(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(made)
    whole = record(store, 1, 4, 16)
    preadv = os.preadv
    monkeypatch.setattr(direct.os, "preadv", lambda handle, views, at: preadv(handle, [views[0][:4096]], at))
    assert len(whole) > 4096
    assert torch.equal(record(store, 1, 4, 16), whole)


def edited(folder: Path, **changes: Any) -> None:
    """Change store.json and make its checksum fit."""
    body = json.loads((folder / "store.json").read_text()) | changes
    body.pop("checksum")
    body["checksum"] = f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
    (folder / "store.json").write_text(json.dumps(body))


def damage(folder: Path, how: str) -> None:
    meta = folder / "store.json"
    body = json.loads(meta.read_text())
    layers = body["layers"]
    match how:
        case "missing layer":
            (folder / "experts-00001-8.bin").unlink()
        case "short layer":
            os.truncate(folder / "experts-00001-8.bin", 4096)
        case "swapped layer":
            shutil.copy(folder / "experts-00001-16.bin", folder / "experts-00001-8.bin")
        case "no checksums":
            (folder / "checksums.safetensors").unlink()
        case "flipped checksums":
            flip(folder / "checksums.safetensors", (folder / "checksums.safetensors").stat().st_size - 2)
        case "no config":
            (folder / "config.json").unlink()
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "no store.json":
            meta.unlink()
        case "no JSON":
            meta.write_text("{")
        case "a list":
            meta.write_text("[]")
        case "deep":
            meta.write_text("[" * 100_000)
        case "edited by hand":
            meta.write_text(meta.read_text().replace('"top_k": 2', '"top_k": 3'))
        case "newer":
            edited(folder, schema_version=2)
        case "unknown field":
            edited(folder, surprise=1)
        case "more experts":
            edited(folder, layers=[layer | {"num_experts": 9} for layer in layers])
        case "negative width":
            edited(folder, layers=[layer | {"d": -1} for layer in layers])
        case "huge width":
            edited(folder, layers=[layer | {"d": 1 << 40} for layer in layers])
        case "odd width":
            edited(folder, layers=[layer | {"d": 33} for layer in layers])
        case "no layers":
            edited(folder, layers=[])
        case "path twice":
            edited(folder, layers=[layers[0], layers[0]])
        case "other bits":
            edited(folder, bits=[16, 7])
        case "more bits":
            edited(folder, bits=[32, 16, 8, 4])


DAMAGES = {
    "missing layer": r"experts-00001-8\.bin: No such file",
    "short layer": "has 4096 bytes, 8 experts take .* not complete",
    "swapped layer": "not complete",
    "no checksums": "could not read .*checksums",
    "flipped checksums": "not what the store was written with",
    "no config": r"config\.json",
    "no weights": r"has lost its model.*safetensors",
    "no store.json": "no expert store.*collegium pack",
    "no JSON": "not readable JSON",
    "a list": "must be a JSON object",
    "deep": "not readable JSON",
    "edited by hand": "field 'checksum' does not fit.*edited",
    "newer": "schema_version is 2; this collegium reads version 1",
    "unknown field": "field 'surprise'",
    "more experts": "not what the store was written with",
    "negative width": r"field 'layers.0.d'",
    "huge width": r"field 'layers.0.d'",
    "odd width": "do not go into 4 bits",
    "no layers": "field 'layers'",
    "path twice": "two layers have one path",
    "other bits": r"field 'bits.1'",
    "more bits": "not what the store was written with",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_store_is_not_opened(folder: Path, how: str) -> None:
    handles = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    damage(folder, how)
    with pytest.raises(CheckpointError, match=DAMAGES[how]):
        open_store(folder)
    if handles:
        assert len(os.listdir("/proc/self/fd")) == handles


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_no_bytes_as_store_json_do_anything_but_raise(made: Path, data: st.DataObject) -> None:
    raw = bytearray((made / "store.json").read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] = data.draw(st.integers(0, 255).filter(lambda value: value != raw[place]))
    original = (made / "store.json").read_bytes()
    (made / "store.json").write_bytes(raw)
    try:
        same = False
        with contextlib.suppress(ValueError):
            same = json.loads(raw) == json.loads(original)
        if not same:
            with pytest.raises(CheckpointError):
                open_store(made)
    finally:
        (made / "store.json").write_bytes(original)


def test_what_is_not_there_or_does_not_fit_is_refused(made: Path) -> None:
    store = open_store(made)
    nbytes = store.layers[0].layouts[8].nbytes
    for layer, expert, bits in ((2, 0, 8), (-1, 0, 8), (0, 8, 8), (0, -1, 8), (0, 0, 32)):
        with pytest.raises(ConfigError, match=r"no expert|experts are here in 16, 8, 4 bits, not in 32"):
            store.read(layer, expert, bits, aligned(nbytes))
    locked = aligned(nbytes)
    locked.flags.writeable = False
    wrong = [aligned(nbytes + 4096), aligned(nbytes + 64)[64:], aligned(2 * nbytes)[::2], locked]
    for into in [*wrong, aligned(nbytes).view(np.int8)]:
        with pytest.raises(ConfigError, match=f"a record of {nbytes} bytes is read into"):
            store.read(0, 0, 8, into)
    store.close()
    store.close()
    with pytest.raises(ConfigError, match="was closed"):
        record(store, 0, 0, 8)


def test_threads_read_at_once(made: Path) -> None:
    expected = {(i, e, b): record(open_store(made), i, e, b) for i, e in experts(open_store(made)) for b in (16, 8, 4)}
    store, wrong, barrier = open_store(made), [], threading.Barrier(4)

    def work(seed: int) -> None:
        order = list(expected)
        np.random.default_rng(seed).shuffle(order)  # type: ignore[arg-type]
        barrier.wait()
        for key in order * 5:
            key = tuple(map(int, key))
            if not torch.equal(record(store, *key), expected[key]):
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_store_or_a_model_is_opened_by_its_folder_or_name(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, plain, demo = open_source(made), open_source(made.parent / "qwen3_moe-model"), open_source("demo")
    assert isinstance(store, ExpertStore)
    assert not isinstance(plain, ExpertStore)
    assert store.fingerprint == plain.fingerprint
    assert store.expert_tensors == frozenset()
    assert [one.path for one in store.layers] == [one.path for one in plain.layers]
    assert len(demo.layers) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_source(made).close()
