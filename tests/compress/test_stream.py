"""Streaming gives what the whole model gives, layer by layer, through kills; what it cannot stream it refuses."""

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
from torch import Tensor

from collegium.compress import stream
from collegium.compress.collectors import OutputMean, OutputNorms, ResidualTurn, RouterSums
from collegium.compress.stream import calibrate
from collegium.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NotMoEError,
    StatisticsError,
    StorageError,
    UnsupportedFamilyError,
)
from collegium.layerwise import LayerwiseModel
from collegium.measure.collect import collect
from collegium.measure.statistics import Statistics
from collegium.measure.super_experts import DownMax
from collegium.models import load
from collegium.models.checkpoint import open_checkpoint
from collegium.sites import register
from tiny import families, tiny_model

LENGTH = 10
DOMAINS = ("code", "prose")
FAMILIES = [
    "afmoe", "beam", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe",
    "granitemoehybrid", "inkling_text", "jamba", "lfm2_moe", "llama4_text", "minimax_m2", "mixtral", "nemotron_h",
    "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe",
]  # fmt: skip


def batches(count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    """Two sequences each, of two domains; the second has four tokens of padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -4:] = 0
    return [
        {
            "input_ids": torch.randint(3, 64, (2, LENGTH), generator=generator),
            "attention_mask": mask,
            "domain": torch.tensor([0, 1]),
        }
        for _ in range(count)
    ]


def folder_of(family: str, root: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    folder = root / family
    tiny_model(family, **overrides).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("qwen3_moe", tmp_path_factory.mktemp("models"), num_hidden_layers=3)


def run(source: Path, out: Path, **settings: Any) -> Statistics:
    data = settings.pop("batches", batches())
    return calibrate(source, data, settings.pop("collectors", [DownMax()]), out, domains=DOMAINS, **settings)


def whole(source: Path, collectors: list[Any], **settings: Any) -> Statistics:
    """What `collect` gathers from the model as a whole."""
    register()
    network = load(source, experts_implementation="collegium")
    fingerprint = open_checkpoint(source).fingerprint
    return collect(
        network, batches(), collectors, domains=DOMAINS, name=source.name, fingerprint=fingerprint, **settings
    )


def assert_same(a: Statistics, b: Statistics) -> None:
    assert a.meta.model_copy(update={"created": ""}) == b.meta.model_copy(update={"created": ""})
    assert a.tensors.keys() == b.tensors.keys()
    for key, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[key]), key


@pytest.mark.parametrize("family", families(*FAMILIES))
def test_the_same_to_the_last_bit_as_the_whole_model(family: str, tmp_path: Path) -> None:
    source = folder_of(family, tmp_path)
    collectors = [DownMax(), OutputNorms(), OutputMean()]
    assert_same(run(source, tmp_path / "s", collectors=collectors), whole(source, collectors))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "olmoe"])
def test_in_bfloat16_with_logits_the_residual_stream_and_a_limit(family: str, tmp_path: Path) -> None:
    source = folder_of(family, tmp_path, torch.bfloat16)
    collectors = [RouterSums(), ResidualTurn()]
    found = run(source, tmp_path / "s", collectors=collectors, max_tokens=29)
    assert found.meta.tokens == 29
    assert_same(found, whole(source, collectors, max_tokens=29))


def test_what_is_returned_is_what_is_stored(model: Path, tmp_path: Path) -> None:
    found = run(model, tmp_path / "s")
    assert_same(Statistics.load(tmp_path / "s"), found)
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_fused_tensors_on_disk_are_read_as_well(tmp_path: Path) -> None:
    source = tmp_path / "qwen3_moe"
    tiny_model("qwen3_moe").save_pretrained(source, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in open_checkpoint(source).tensors
    assert_same(run(source, tmp_path / "s"), whole(source, [DownMax()]))


def test_shards_and_another_dtype(tmp_path: Path) -> None:
    source = tmp_path / "mixtral"
    tiny_model("mixtral").save_pretrained(source, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    found = run(source, tmp_path / "s", dtype="bfloat16")
    register()
    network = load(source, torch.bfloat16, experts_implementation="collegium")
    other = collect(network, batches(), [DownMax()], domains=DOMAINS)
    assert all(torch.equal(found.tensors[key], other.tensors[key]) for key in found.tensors)


def test_one_layer_in_memory_at_a_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed: list[LayerwiseModel] = []

    class Kept(LayerwiseModel):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            streamed.append(self)

    def real() -> list[int]:
        layers = streamed[0].layers
        return [n for n, layer in enumerate(layers) if not all(p.is_meta for p in layer.parameters())]

    seen = []
    monkeypatch.setattr(stream, "LayerwiseModel", Kept)
    run(model, tmp_path / "s", progress=lambda done, layers, share: seen.append((done, layers, share, real())))
    assert [(done, layers) for done, layers, *_ in seen] == [(n, 3) for n in range(3) for _ in range(4)]
    assert [share for *_, share, _ in seen[:4]] == [0, 1 / 3, 2 / 3, 1]
    assert all(layers == ([done] if share else []) for done, _, share, layers in seen)
    assert real() == []
    assert streamed[0].embedding.weight.is_meta


class Stop(Exception):
    pass


def stop_at(layer: int, share: float) -> Any:
    def progress(done: int, layers: int, part: float) -> None:
        if done == layer and part >= share:
            raise Stop

    return progress


@pytest.mark.parametrize(("layer", "share"), [(0, 0.3), (1, 0), (1, 1), (2, 0.6)])
def test_a_run_that_was_cut_short_goes_on_with_its_layer(layer: int, share: float, model: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(model, tmp_path / "s", progress=stop_at(layer, share))
    assert not (tmp_path / "s").exists()
    seen: list[int] = []
    found = run(model, tmp_path / "s", progress=lambda done, layers, part: seen.append(done))
    assert min(seen) == layer
    assert_same(found, whole(model, [DownMax()]))
    assert not (tmp_path / "s.partial").exists()


def test_a_killed_run_goes_on(model: Path, tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from test_stream import run
        def progress(done, layers, share):
            if done == 1 and share > 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
        run(Path(sys.argv[1]), Path(sys.argv[2]), progress=progress)
    """
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(code), str(model), str(tmp_path / "s")]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "s").exists()
    seen: list[int] = []
    found = run(model, tmp_path / "s", progress=lambda done, layers, part: seen.append(done))
    assert min(seen) == 1
    assert_same(found, whole(model, [DownMax()]))


def test_dense_layers_are_not_run_again_either(tmp_path: Path) -> None:
    source = folder_of("deepseek_v3", tmp_path, num_hidden_layers=3, first_k_dense_replace=2)
    with pytest.raises(Stop):
        run(source, tmp_path / "s", progress=stop_at(2, 0.5))
    assert sorted(file.name for file in (tmp_path / "s.partial").iterdir()) == ["hidden-00002.bin", "run.json"]
    seen: list[int] = []
    found = run(source, tmp_path / "s", progress=lambda done, layers, part: seen.append(done))
    assert set(seen) == {2}
    assert_same(found, whole(source, [DownMax()]))


def test_another_run_is_not_gone_on_with(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(model, tmp_path / "s", progress=stop_at(0, 0), dtype="float16")  # no layer is done yet
    with pytest.raises(Stop):
        run(model, tmp_path / "s", progress=stop_at(1, 0))
    with pytest.raises(ConfigError, match="differs in tokens"):
        run(model, tmp_path / "s", batches=batches(seed=1))
    with pytest.raises(ConfigError, match="differs in collectors"):
        run(model, tmp_path / "s", collectors=[])
    with pytest.raises(ConfigError, match="differs in dtype"):
        run(model, tmp_path / "s", dtype="bfloat16")
    found = run(model, tmp_path / "s", batches=batches(seed=1), resume=False)
    assert found.meta.tokens == 48


def test_damaged_leftovers_are_noticed(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(model, tmp_path / "s", progress=stop_at(1, 0.5))
    hidden = tmp_path / "s.partial" / "hidden-00001.bin"
    content = hidden.read_bytes()
    for damaged, message in ((content[:-4], "shorter"), (content + b"1234", "longer")):
        hidden.write_bytes(damaged)
        with pytest.raises(StatisticsError, match=message):
            run(model, tmp_path / "s")
    hidden.unlink()
    with pytest.raises(StatisticsError, match="not the hidden states"):
        run(model, tmp_path / "s")
    (tmp_path / "s.partial" / "run.json").write_text("{")
    with pytest.raises(StatisticsError, match="not readable"):
        run(model, tmp_path / "s")
    run(model, tmp_path / "s", resume=False)


def test_targets_that_hold_something(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "s")
    with pytest.raises(ConfigError, match="holds statistics already"):
        run(model, tmp_path / "s")
    assert run(model, tmp_path / "s", batches=batches(1), resume=False).meta.tokens == 16
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").touch()
    with pytest.raises(ConfigError, match="holds no statistics"):
        run(model, tmp_path / "mine", resume=False)
    (tmp_path / "mine").rename(tmp_path / "t.partial")
    with pytest.raises(ConfigError, match="not an unfinished calibration"):
        run(model, tmp_path / "t", resume=False)


def test_a_full_disk_leaves_no_target_and_the_finished_layers(model: Path, tmp_path: Path) -> None:
    one = batches(1)
    hidden = 2 * LENGTH * 32 * 4

    def limit(done: int, layers: int, share: float) -> None:
        if done == 1 and share == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hidden // 2, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(StorageError, match=r"hidden-00002\.bin"):
            run(model, tmp_path / "s", batches=one, progress=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "s").exists()
    seen: list[int] = []
    run(model, tmp_path / "s", batches=one, progress=lambda done, layers, share: seen.append(done))
    assert min(seen) == 1


def test_data_that_does_not_fit(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token"):
        run(model, tmp_path / "s", batches=[])
    with pytest.raises(ConfigError, match="do not belong together"):
        run(model, tmp_path / "s", batches=[{"input_ids": torch.tensor([[3, 64]])}])
    with pytest.raises(ConfigError, match="no index into the 2 domains"):
        run(model, tmp_path / "s", batches=[{"input_ids": torch.tensor([[3]]), "domain": torch.tensor([2])}])
    with pytest.raises(ConfigError, match="dtype"):
        run(model, tmp_path / "s", dtype="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "message"),
    [("gemma4_text", "also take per_layer_input, shared_kv_states"), ("nllb-moe", "several stacks")],
)
def test_families_that_cannot_be_streamed_are_named(family: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFamilyError, match=message) as error:
        run(folder_of(family, tmp_path), tmp_path / "s")
    assert family in str(error.value)


def test_checkpoints_that_cannot_be_streamed(tmp_path: Path) -> None:
    with pytest.raises(NotMoEError):
        run(folder_of("llama", tmp_path), tmp_path / "s")
    source = folder_of("mixtral", tmp_path)
    config = json.loads((source / "config.json").read_text())
    for extra, message in (
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"collegium": {"version": 1, "moe": {}, "layers": [0]}}, "collegium's own"),
    ):
        (source / "config.json").write_text(json.dumps(config | extra))
        with pytest.raises(UnsupportedFamilyError, match=message):
            run(source, tmp_path / "s")


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
)
@pytest.mark.parametrize("how", ["missing", "another shape", "NaN"])
def test_damaged_weights_are_named(name: str, how: str, tmp_path: Path) -> None:
    source = folder_of("qwen3_moe", tmp_path)
    tensors = load_file(source / "model.safetensors")
    if how == "NaN":
        tensors[name][0, 0] = float("nan")
    else:
        changed = tensors.pop(name)
        tensors |= {} if how == "missing" else {name: changed[1:].clone()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"layers\.1") as error:
        run(source, tmp_path / "s")
    assert type(error.value).__name__ == ("NonFiniteError" if how == "NaN" else "CheckpointError")


def test_a_tensor_of_no_module_is_named(tmp_path: Path) -> None:
    source = folder_of("qwen3_moe", tmp_path)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.surplus.weight"] = torch.zeros(3)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected tensors: model\.layers\.0\.mlp\.surplus"):
        run(source, tmp_path / "s")


def test_a_source_that_changes_meanwhile(tmp_path: Path) -> None:
    source = folder_of("qwen3_moe", tmp_path)

    def change(done: int, layers: int, share: float) -> None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        run(source, tmp_path / "s", progress=change)
    assert not (tmp_path / "s").exists()


def test_a_source_that_disappears(tmp_path: Path) -> None:
    source = folder_of("qwen3_moe", tmp_path)
    with pytest.raises(CheckpointError, match=r"could not read 'model\.layers\.0'"):
        run(source, tmp_path / "s", progress=lambda done, layers, share: (source / "model.safetensors").unlink())
