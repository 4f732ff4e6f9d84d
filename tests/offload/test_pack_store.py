"""Packing: every expert in every precision, the rest as it was, through kills and full disks, and refusals by name."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from storing import WIDE, experts, model_of, oracle, record, written
from typer.testing import CliRunner

from collegium.assets import SHIPPED
from collegium.cli.main import app
from collegium.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    NotMoEError,
    StorageError,
    UnsupportedFamilyError,
)
from collegium.models.checkpoint import open_checkpoint
from collegium.offload.store import open_store, pack
from tiny import families, tiny_model

FAMILIES = [
    "deepseek_v3", "ernie4_5_vl_moe", "gemma4", "gpt_oss", "granitemoe", "jamba", "kimi_k25", "mixtral", "nemotron_h",
    "olmoe", "qwen2_moe", "qwen3_vl_moe", "zaya",
]  # fmt: skip


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of("qwen3_moe", tmp_path_factory.mktemp("models"), num_hidden_layers=3, **WIDE)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stop_after(nbytes: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done > nbytes:
            raise Stop

    return progress


@pytest.mark.parametrize("model_type", families(*FAMILIES))
def test_records_and_the_rest_hold_what_the_model_holds(model_type: str, tmp_path: Path) -> None:
    folder = model_of(model_type, tmp_path)
    store = pack(folder, tmp_path / "store", bits=(16, 8))
    truth = oracle(folder, torch.bfloat16)
    assert [one.path for one in store.layers] == list(truth)
    assert store.fingerprint == open_checkpoint(folder).fingerprint
    for layer, expert in experts(store):
        one = store.layers[layer]
        assert one.num_experts == len(truth[one.path])
        for bits in (16, 8):
            expected = written(one.layouts[bits], truth[one.path][expert])
            assert torch.equal(record(store, layer, expert, bits), expected)
    source, rest = open_checkpoint(folder).tensors, store.checkpoint.tensors
    assert {name for name in source if name not in rest} == {name for name in source if _is_expert(name, model_type)}
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "store" / "model.safetensors")
    for name, tensor in after.items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name


def _is_expert(name: str, model_type: str) -> bool:
    if model_type == "granitemoe":
        return ".block_sparse_moe.input_linear" in name or ".block_sparse_moe.output_linear" in name
    return ".experts." in name and ".router" not in name.partition(".experts.")[2]


def test_layouts_tell_what_families_differ_in(tmp_path: Path) -> None:
    found = {
        name: pack(model_of(name, tmp_path), tmp_path / name).layers
        for name in ("gpt_oss", "nemotron_h", "deepseek_v3")
    }
    gpt_oss, nemotron_h, deepseek = (found[name][0].layouts[16] for name in found)
    assert (gpt_oss.interleaved, gpt_oss.bias, gpt_oss.gated) == (True, True, True)
    assert (nemotron_h.gated, nemotron_h.bias, nemotron_h.u) == (False, False, nemotron_h.f)
    assert (deepseek.interleaved, deepseek.u) == (False, 2 * deepseek.f)
    assert [one.layer for one in found["deepseek_v3"]] == [1]  # layer 0 is dense


def test_shards_of_a_large_model_and_a_fused_one_pack_alike(tmp_path: Path) -> None:
    model = tiny_model("olmoe").bfloat16()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="30KB")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    stores = [pack(tmp_path / name, tmp_path / f"{name}-store") for name in ("one", "many", "fused")]
    for layer, expert in experts(stores[0]):
        first, *others = (record(store, layer, expert, 16) for store in stores)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wider_weights_keep_their_bits_whatever_the_config_says(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = model_of("qwen3_moe", tmp_path, dtype)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    store = pack(folder, tmp_path / "store", bits=(32, 16))
    truth = oracle(folder, torch.float32)
    for layer, expert in experts(store):
        matrices = truth[store.layers[layer].path][expert]
        assert torch.equal(record(store, layer, expert, 32), written(store.layers[layer].layouts[32], matrices))
        assert torch.equal(record(store, layer, expert, 16), written(store.layers[layer].layouts[16], matrices))


def test_layers_for_multi_token_prediction_are_left_out(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / "model.safetensors")
    extra = {name.replace(".2.", ".3."): tensor.clone() for name, tensor in tensors.items() if ".layers.2." in name}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    store = pack(folder, tmp_path / "store")
    assert len(store.layers) == 3
    assert store.meta.left_out == len(extra)
    assert not any(".layers.3." in name for name in store.checkpoint.tensors)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
def test_an_interrupted_run_goes_on_with_the_layer_it_was_at(model: Path, tmp_path: Path, share: float) -> None:
    settings: dict[str, Any] = {"bits": (16, 8, 4), "group": 32}
    seen: list[int] = []
    pack(model, tmp_path / "whole", progress=lambda done, total: seen.append(total), **settings)
    with pytest.raises(Stop):
        pack(model, tmp_path / "store", progress=stop_after(int(seen[0] * share)), **settings)
    assert not (tmp_path / "store").exists()
    kept = len(list((tmp_path / "store.partial").glob("done-*")))
    inodes = {file.name: file.stat().st_ino for file in (tmp_path / "store.partial").glob("experts-*")}
    pack(model, tmp_path / "store", **settings)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    after = {file.name: file.stat().st_ino for file in (tmp_path / "store").glob("experts-*")}
    assert sum(after[name] == inode for name, inode in inodes.items()) == 3 * kept
    assert kept == {0.2: 0, 0.5: 1, 0.99: 3}[share]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["store", "whole"]


def test_a_killed_run_goes_on(model: Path, tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from collegium.offload.store import pack
        def progress(done, total):
            if done > total // 2:
                os.kill(os.getpid(), signal.SIGKILL)
        pack(sys.argv[1], sys.argv[2], progress=progress)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(model), str(tmp_path / "store")]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "store").exists()
    assert list((tmp_path / "store.partial").glob("done-*"))
    pack(model, tmp_path / "store")
    pack(model, tmp_path / "whole")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_kept_layer_that_is_damaged_is_written_again(model: Path, tmp_path: Path) -> None:
    pack(model, tmp_path / "whole")
    size = (tmp_path / "whole" / "experts-00000-16.bin").stat().st_size
    with pytest.raises(Stop):
        pack(model, tmp_path / "store", progress=stop_after(2 * size))
    done = sorted((tmp_path / "store.partial").glob("experts-*"))
    assert len(done) == 2
    flip(done[0], 100)
    os.truncate(done[1], size - 1)
    pack(model, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def flip(path: Path, offset: int) -> None:
    """Turn one bit over."""
    with open(path, "rb+") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def test_what_is_left_of_another_run_is_not_mixed_in(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        pack(model, tmp_path / "store", progress=stop_after(100_000))
    with pytest.raises(ConfigError, match=r"store\.partial is what is left of .*--overwrite"):
        pack(model, tmp_path / "store", bits=(8,))
    assert open_bits(pack(model, tmp_path / "store", bits=(8,), overwrite=True)) == {8}
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="not an unfinished store"):
        pack(model, tmp_path / "other", overwrite=True)
    assert (tmp_path / "other.partial" / "thesis.tex").exists()


def open_bits(store: Any) -> set[int]:
    return {int(file.stem.rpartition("-")[2]) for file in store.folder.glob("experts-*")}


def test_two_processes_do_not_write_one_store(model: Path, tmp_path: Path) -> None:
    errors = []

    def progress(done: int, total: int) -> None:
        if not errors:
            with pytest.raises(ConfigError) as found:
                pack(model, tmp_path / "store")
            errors.append(str(found.value))

    pack(model, tmp_path / "store", progress=progress)
    assert "another process" in errors[0]


def test_a_store_is_replaced_only_when_asked(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    out.mkdir()  # an empty folder is no obstacle
    pack(model, out).close()
    before = contents(out)
    with pytest.raises(ConfigError, match="--overwrite"):
        pack(model, out, bits=(8,))
    with pytest.raises(Stop):
        pack(model, out, bits=(8,), overwrite=True, progress=stop_after(100))
    assert contents(out) == before
    assert open_bits(pack(model, out, bits=(8,), overwrite=True)) == {8}
    assert [file.name for file in tmp_path.iterdir()] == ["store"]
    with pytest.raises(ConfigError, match="already; pack the model"):
        pack(out, tmp_path / "again")
    with pytest.raises(ConfigError, match="no expert store"):
        pack(model, model, overwrite=True)


def test_a_full_disk_leaves_no_store_and_the_finished_layers(model: Path, tmp_path: Path) -> None:
    size = sum(file.stat().st_size for file in (pack(model, tmp_path / "whole").folder).glob("experts-00000-*"))

    def limit(done: int, total: int) -> None:
        if done > size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(StorageError, match=r"experts-00001-16\.bin"):
            pack(model, tmp_path / "store", progress=limit)
        with pytest.raises(StorageError):
            pack(model, tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "store").exists()
    names = sorted(file.name for file in (tmp_path / "store.partial").iterdir())
    assert names == ["done-00000.safetensors", "experts-00000-16.bin", "pack.json"]
    pack(model, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_full_disk_while_the_rest_is_copied(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("collegium.models.shards._write_all", full)
        with pytest.raises(StorageError, match="No space left"):
            pack(model, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    pack(model, tmp_path / "store")


def test_an_expert_with_nan_or_too_large_a_weight_is_named(tmp_path: Path) -> None:
    folder = model_of("qwen3_moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    for value, bits, message in (
        (float("nan"), 16, r"expert 5 of layer 1 \(model\.layers\.1\.mlp\) holds NaN or infinity in down"),
        (-float("inf"), 8, "expert 5 of layer 1 .* in down"),
        (1e30, 8, "expert 5 of layer 1 .* in down.* too large for 8 bits"),
    ):
        tensors[name][3, 2] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(NonFiniteError, match=message):
            pack(folder, tmp_path / "store", bits=(bits,), overwrite=True)
        assert not (tmp_path / "store").exists()
    pack(folder, tmp_path / "store", overwrite=True)  # 1e30 goes into bfloat16


def test_what_cannot_be_packed_is_refused_before_anything_is_written(tmp_path: Path, model: Path) -> None:
    refused: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("llama4_text", {}, UnsupportedFamilyError, "'llama4_text' cannot be run from a disk"),
        ("nllb-moe", {}, UnsupportedFamilyError, "several stacks"),
        ("llama", {}, NotMoEError, "no MoE block"),
        ("qwen3_moe", {"bits": (4,)}, ConfigError, r"layer 0 .* do not go into 4 bits"),
        ("qwen3_moe", {"bits": (32,)}, ConfigError, "bfloat16, which 16 bits hold exactly"),
        ("qwen3_moe", {"bits": (16, 5)}, ConfigError, r"bits must be .*\[16, 5\]"),
        ("qwen3_moe", {"bits": ()}, ConfigError, "bits must be"),
        ("qwen3_moe", {"bits": (8, 8)}, ConfigError, "each once"),
        ("qwen3_moe", {"bits": (8,), "group": 16}, ConfigError, "group must be 32 or 64, not 16"),
    ]
    for family, settings, error, message in refused:
        folder = tmp_path / f"{family}-model"
        if not folder.exists():
            model_of(family, tmp_path)
        with pytest.raises(error, match=message):
            pack(folder, tmp_path / "store", **settings)
        assert not list(tmp_path.glob("store*"))
    config = json.loads((model / "config.json").read_text())
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    (quantised / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UnsupportedFamilyError, match="is quantised"):
        pack(quantised, tmp_path / "store")
    with pytest.raises(CheckpointError, match="not a folder"):
        pack(tmp_path / "nothing", tmp_path / "store")


def test_a_model_that_changes_meanwhile_makes_no_store(tmp_path: Path) -> None:
    folder = model_of("qwen3_moe", tmp_path)

    def touch(done: int, total: int) -> None:
        (folder / "generation_config.json").write_text("{}")

    with pytest.raises(CheckpointError, match="was changed while it was read"):
        pack(folder, tmp_path / "store", progress=touch)
    assert not (tmp_path / "store").exists()


def test_the_verb(tmp_path: Path) -> None:
    out = tmp_path / "store"
    result = CliRunner().invoke(app, ["pack", "demo", "--out", str(out), "--bits", "8", "--bits", "4", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["layers"], found["experts"], found["bits"], found["group"]) == (4, 64, [8, 4], 32)
    assert found["fingerprint"] == open_checkpoint(SHIPPED["demo"]).fingerprint
    assert found["experts_nbytes"]["8"] == sum(file.stat().st_size for file in out.glob("experts-*-8.bin"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (SHIPPED["demo"] / name).read_bytes()
    again = CliRunner().invoke(app, ["pack", "demo", "--out", str(out)])
    assert isinstance(again.exception, ConfigError)
    printed = CliRunner().invoke(app, ["pack", "demo", "--out", str(out), "--overwrite"])
    assert printed.stdout.startswith("64 experts in 4 layers: 9.44 MB in 16 bits; the rest of the model ")
    assert open_bits(open_store(out)) == {16}


def test_no_layer_is_loaded_where_the_bytes_can_be_found(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("a whole layer was loaded")

    converted = model_of("ernie4_5_vl_moe", tmp_path)
    monkeypatch.setattr("collegium.layerwise.LayerwiseModel.layer_loaded", refuse)
    pack(model, tmp_path / "store")
    with pytest.raises(AssertionError, match="whole layer"):
        pack(converted, tmp_path / "other")
