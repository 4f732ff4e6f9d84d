"""Rewriting when something is wrong: a message that says what, and never half a checkpoint."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from collegium.compress import rewrite
from collegium.compress.rewrite import apply_plan
from collegium.errors import CheckpointError, ConfigError, PlanError, StorageError, UnsupportedFamilyError
from collegium.models import shards
from collegium.models.checkpoint import open_checkpoint
from pruning import plan_of, saved


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tmp_path, "olmoe")


def edit(folder: Path, **changes: Any) -> None:
    """Change the config."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors."""
    tensors = load_file(folder / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def nothing_is_left(root: Path) -> bool:
    return sorted(path.name for path in root.iterdir()) == ["source"]


def test_layers_left_with_different_numbers_are_no_checkpoint(tmp_path: Path, source: Path) -> None:
    plan = plan_of(source, {0: (0, 1, 2), 1: (0, 1)})
    with pytest.raises(PlanError, match=r"keeps 2 to 3 experts, .* apply it as a mask"):
        apply_plan(plan, source, tmp_path / "out")


def test_a_plan_for_another_model_is_refused(tmp_path: Path, source: Path) -> None:
    plan = plan_of(source)
    edit_tensors(source, {"model.norm.weight": torch.zeros(32)})
    with pytest.raises(PlanError, match="fingerprint"):
        apply_plan(plan, source, tmp_path / "out")
    assert nothing_is_left(tmp_path)


def test_what_is_in_the_way_is_never_replaced(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    plan = plan_of(source)
    (out / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="out exists"):
        apply_plan(plan, source, out)
    assert (out / "mine").read_text() == "mine"
    (out / "mine").unlink()
    apply_plan(plan, source, out)
    with pytest.raises(ConfigError, match="exists"):
        apply_plan(plan, source, source)


def test_a_source_that_changes_meanwhile_gives_nothing(tmp_path: Path, source: Path) -> None:
    plan, file = plan_of(source), source / "model.safetensors"
    content = file.read_bytes()

    def change(done: int, total: int) -> None:
        if done == total:
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        apply_plan(plan, source, tmp_path / "out", progress=change)
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize("kernel", [None, os.copy_file_range])
def test_a_source_that_becomes_shorter_gives_nothing(tmp_path: Path, source: Path, monkeypatch, kernel) -> None:
    monkeypatch.setattr(shards, "_KERNEL_COPY", kernel)
    plan, file = plan_of(source), source / "model.safetensors"

    def shorten(done: int, total: int) -> None:
        os.truncate(file, 20_000)

    with pytest.raises(CheckpointError, match="became shorter"):
        apply_plan(plan, source, tmp_path / "out", progress=shorten)
    assert nothing_is_left(tmp_path)


def test_a_kernel_that_cannot_copy_between_these_files(tmp_path: Path, source: Path, monkeypatch) -> None:
    plan = plan_of(source)
    expected = open_checkpoint(apply_plan(plan, source, tmp_path / "kernel"))

    def refuse(*arguments: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    for number, kernel in enumerate((refuse, lambda *arguments: 0, None)):
        monkeypatch.setattr(shards, "_KERNEL_COPY", kernel)
        monkeypatch.setattr(shards, "_BUFFER", 1000)
        found = open_checkpoint(apply_plan(plan, source, tmp_path / str(number)))
        file = "model.safetensors"
        assert (found.folder / file).read_bytes() == (expected.folder / file).read_bytes()


def test_missing_shards_are_named(tmp_path: Path) -> None:
    from tiny import tiny_model

    source = tmp_path / "source"
    tiny_model("olmoe").save_pretrained(source, max_shard_size="40KB")
    plan = plan_of(source)
    gone = sorted(source.glob("model-*"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        apply_plan(plan, source, tmp_path / "out")


def test_killed_half_way(tmp_path: Path, source: Path) -> None:
    plan_of(source).save(tmp_path / "plan.json")
    program = (
        "import os, sys\nfrom collegium.compress.plan import Plan\nfrom collegium.compress.rewrite import apply_plan\n"
        "kill = lambda done, total: done > total / 2 and os.kill(os.getpid(), 9)\n"
        "apply_plan(Plan.load(sys.argv[1]), sys.argv[2], sys.argv[3], progress=kill)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "plan.json"), str(source), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -9
    assert not (tmp_path / "out").exists()
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".partial")]
    assert len(left) == 1
    assert any((left[0] / "model.safetensors").read_bytes())
    apply_plan(plan_of(source), source, tmp_path / "out")
    assert not left[0].exists(), "the next run clears up"


@pytest.mark.parametrize("kernel", [None, os.copy_file_range])
def test_disk_full_half_way(tmp_path: Path, source: Path, monkeypatch, kernel) -> None:
    # a file-size limit fails a write the way a full disk does, without needing a file system of our own
    monkeypatch.setattr(shards, "_KERNEL_COPY", kernel)
    plan = plan_of(source)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(StorageError, match="File too large"):
            apply_plan(plan, source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert nothing_is_left(tmp_path)


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, source: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"needs 0\.00 GB"):
        apply_plan(plan_of(source), source, tmp_path / "deep" / "out")
    assert nothing_is_left(tmp_path)


def with_mtp(root: Path) -> Path:
    """A DeepSeek-V3 with a layer for multi-token prediction behind its two."""
    folder = saved(root, "deepseek_v3")
    tensors = load_file(folder / "model.safetensors")
    extra = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n}
    edit_tensors(folder, extra)
    edit(folder, num_nextn_predict_layers=1)
    return folder


def test_multi_token_prediction_is_dropped_kept_or_refused(tmp_path: Path) -> None:
    source = with_mtp(tmp_path)
    with pytest.raises(PlanError, match=r'layers\.2\..*"drop".*"keep"'):
        apply_plan(plan_of(source), source, tmp_path / "out")
    old = open_checkpoint(source).tensors
    kept = open_checkpoint(apply_plan(plan_of(source, mtp="keep"), source, tmp_path / "kept"))
    assert {n for n in old if "layers.2." in n} == {n for n in kept.tensors if "layers.2." in n}
    assert kept.tensors["model.layers.2.mlp.gate.weight"].shape == (8, 32)
    assert kept.tensors["model.layers.1.mlp.gate.weight"].shape == (4, 32)
    gone = open_checkpoint(apply_plan(plan_of(source, mtp="drop"), source, tmp_path / "gone"))
    assert not [n for n in gone.tensors if "layers.2." in n]
    assert (kept.config["num_nextn_predict_layers"], gone.config["num_nextn_predict_layers"]) == (1, 0)


ROUTER = "model.layers.1.mlp.gate"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{ROUTER}.weight_scale_inv": torch.ones(1, 1)}, "weight_scale_inv"),
        ({f"{ROUTER}.tid2eid": torch.zeros(64, 2, dtype=torch.int64)}, "tid2eid"),
        ({f"{ROUTER}.weight": torch.ones(32, 8)}, "cannot be cut"),
        ({f"{ROUTER}.weight": torch.ones(9, 32)}, "no router weight"),
        ({f"{ROUTER}.weight": None}, "no router weight"),
        ({"model.layers.1.mlp.experts.odd": torch.ones(3)}, "neither its name nor its first axis"),
    ],
)
def test_tensors_that_cannot_be_cut_are_named(tmp_path: Path, source: Path, change, message: str) -> None:
    plan = plan_of(source)
    edit_tensors(source, change)
    plan = plan.model_copy(update={"fingerprint": None})
    with pytest.raises(UnsupportedFamilyError, match=message):
        apply_plan(plan, source, tmp_path / "out")
    assert nothing_is_left(tmp_path)


def test_a_tensor_that_counts_experts_unseen_is_found_by_the_model_class(tmp_path: Path, source: Path) -> None:
    plan = plan_of(source).model_copy(update={"fingerprint": None})
    lay_out = rewrite.lay_out

    def forget_a_layer(tensors, num_experts, keep, without):
        pieces, dropped = lay_out(tensors, num_experts, keep, without)
        lost = [piece for piece in pieces if piece.name == "model.norm.weight"]
        return [piece for piece in pieces if piece not in lost], [*dropped, *(piece.name for piece in lost)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrite, "lay_out", forget_a_layer)
        with pytest.raises(UnsupportedFamilyError, match="32 parameters more than would be kept"):
            apply_plan(plan, source, tmp_path / "out")
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_experts": [8, 8]}, "num_experts is "), ({"num_experts": 16, "num_local_experts": 16}, "is 16")],
)
def test_a_config_that_counts_otherwise_is_refused(tmp_path: Path, source: Path, changes, message: str) -> None:
    plan = plan_of(source).model_copy(update={"fingerprint": None})
    edit(source, **changes)
    with pytest.raises(CheckpointError, match=message):
        apply_plan(plan, source, tmp_path / "out")


def test_a_config_without_the_number_is_refused(tmp_path: Path, source: Path) -> None:
    plan = plan_of(source).model_copy(update={"fingerprint": None})
    edit(source, num_experts=None, num_local_experts=None)
    with pytest.raises(CheckpointError, match="does not say how many experts"):
        apply_plan(plan, source, tmp_path / "out")


def test_a_family_whose_experts_are_not_what_they_seem(tmp_path: Path, source: Path) -> None:
    plan = plan_of(source).model_copy(update={"fingerprint": None})
    edit(source, model_type="jetmoe")
    with pytest.raises(UnsupportedFamilyError, match="attention"):
        apply_plan(plan, source, tmp_path / "out")


def test_the_written_headers_are_compared_with_the_plan(tmp_path: Path, source: Path, monkeypatch) -> None:
    write = rewrite.write_shards

    def lose_one(files, folder, out, progress, compute):
        write({name: pieces[:-1] for name, pieces in files.items()}, folder, out, progress, compute)

    monkeypatch.setattr(rewrite, "write_shards", lose_one)
    with pytest.raises(CheckpointError, match="not the planned one"):
        apply_plan(plan_of(source), source, tmp_path / "out")
    assert nothing_is_left(tmp_path)
