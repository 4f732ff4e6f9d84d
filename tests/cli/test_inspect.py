"""``collegium inspect``: facts from headers, on paper and as JSON."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from folders import model_folder
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from collegium.cli.main import app, main
from tiny import tiny_model


def inspect(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a user's error prints."""
    monkeypatch.setattr(sys, "argv", ["collegium", *map(str, arguments)])
    capsys.readouterr()  # making model folders prints progress bars
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_facts_of_a_moe_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "qwen2_moe", num_hidden_layers=3, mlp_only_layers=[0], tokenizer=False)
    printed = inspect(folder)
    for fact in ("qwen2_moe", "3, of which 2 are MoE", "softmax", "1-2", "shared experts", "from the headers", "F32"):
        assert fact in printed
    record = json.loads(inspect(folder, "--json"))
    model = tiny_model("qwen2_moe", num_hidden_layers=3, mlp_only_layers=[0], vocab_size=260)
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert f"{record['parameters']:,}" in printed
    assert f"{record['active_parameters']:,}" in printed
    assert [layer["layer"] for layer in record["moe_layers"]] == [1, 2]
    assert len(record["fingerprint"]) == 32


def test_layers_that_differ_are_shown_apart(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "olmoe", num_hidden_layers=3, tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if "layers.1.mlp.experts" not in n or int(n.split(".")[5]) < 5},
        folder / "model.safetensors",
    )
    rows = [line.split("│")[1:4] for line in inspect(folder).splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows[-3:]] == [["0", "8", "2"], ["1", "5", "2"], ["2", "8", "2"]]


def test_a_dense_model_is_described_and_not_an_error(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "llama", tokenizer=False)
    assert "no MoE layers: this is a dense model" in inspect(folder)
    assert json.loads(inspect(folder, "--json"))["moe_layers"] == []


def test_config_alone_is_enough_and_said(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, tokenizer=False)
    exact = json.loads(inspect(folder, "--json"))
    (folder / "model.safetensors").unlink()
    predicted = json.loads(inspect(folder, "--json"))
    assert predicted["source"] == "predicted"
    assert predicted["fingerprint"] is None
    assert predicted["parameters"] == exact["parameters"]
    assert "predicted from the config" in inspect(folder)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path, max_shard_size="40KB")
    gone = sorted(tmp_path.glob("model-*"))[1]
    gone.unlink()
    assert gone.name in inspect(tmp_path)
    assert json.loads(inspect(tmp_path, "--json"))["missing"] == [gone.name]


def test_verify_names_the_damaged_tensor(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = model_folder(tmp_path, tokenizer=False)
    inspect(folder, "--verify")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.gate.weight"][2, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    assert "'model.layers.1.mlp.gate.weight'" in refused(monkeypatch, capsys, "inspect", folder, "--verify")


def test_damaged_files_are_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = model_folder(tmp_path, tokenizer=False)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    assert "model.safetensors is truncated" in refused(monkeypatch, capsys, "inspect", folder)
    flipped = bytearray(content)
    flipped[content.index(b'"dtype"') + 1] ^= 1
    file.write_bytes(flipped)
    assert "must hold exactly dtype" in refused(monkeypatch, capsys, "inspect", folder)
    shutil.rmtree(folder)
    assert "no model folder" in refused(monkeypatch, capsys, "inspect", folder)
