"""Statistics of gradients, taken layer by layer, are autograd's on the whole model, through kills too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stream import DOMAINS, FAMILIES, Stop, assert_same, batches, folder_of
from torch import Tensor
from torch.nn import functional as F

from collegium.compress import stream, stream_backward
from collegium.compress.collectors_outputs import HiddenSums
from collegium.compress.gradients import HiddenGradients, WeightGradients
from collegium.compress.stream import calibrate
from collegium.errors import ConfigError, StatisticsError, UnsupportedFamilyError
from collegium.layerwise import LayerwiseModel
from collegium.measure.collect import collect, weights_of
from collegium.measure.statistics import Statistics
from collegium.measure.super_experts import DownMax
from collegium.models import load
from collegium.sites import Site, register, sites
from tiny import families

REFUSED = ("llama4_text",)
GRADED = [HiddenGradients(), WeightGradients()]


def run(source: Path, out: Path, **settings: Any) -> Statistics:
    data, collectors = settings.pop("batches", batches()), settings.pop("collectors", GRADED)
    return calibrate(source, data, collectors, out, domains=DOMAINS, **settings)


class Experts:
    """The experts of one block, one token and slot after the other, with everything that has a gradient kept."""

    def __init__(self, site: Site) -> None:
        self.site, self.weights = site, weights_of(site)
        self.rows: list[tuple[int, int, Tensor, Tensor]] = []
        site.experts.forward = self.forward

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        weights, outputs = self.weights, []
        for t, x in enumerate(hidden_states):
            output = torch.zeros_like(x)
            for e, w in zip(top_k_index[t].tolist(), top_k_weights[t], strict=True):
                up = x @ weights.up_t[e] + (0 if weights.up_bias is None else weights.up_bias[e])
                h = weights.activation(up[None])[0]
                y = h @ weights.down_t[e] + (0 if weights.down_bias is None else weights.down_bias[e])
                h.retain_grad()
                y.retain_grad()
                output = output + w * (y if weights.post_norm is None else weights.post_norm(y))
                self.rows.append((t, e, h, y))
            outputs.append(output)
        return torch.stack(outputs)


def summed_nats(model: Any, batch: dict[str, Tensor], counted: Tensor) -> Tensor:
    ids = batch["input_ids"]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    logits = model(**inputs, use_cache=False).logits.float()
    live = counted[:, 1:] & counted[:, :-1]
    return F.cross_entropy(logits[:, :-1][live], ids[:, 1:][live], reduction="sum")


def autograd_hidden(source: Path, data: list[dict[str, Tensor]], limit: int = 10**9) -> dict[tuple[int, str], Tensor]:
    """``dh_sq`` and ``hdh_sq`` of each layer, ``m [E, d, d]`` the sum of g g^T, from the whole model's graph."""
    model = load(source)
    found: dict[tuple[int, str], Tensor] = {}
    seen = 0
    for batch in data:
        counted = batch["attention_mask"].bool()
        counted &= (counted.flatten().cumsum(0) <= limit - seen).view_as(counted)
        seen += int(counted.sum())
        experts = [Experts(site) for site in sites(model)]
        summed_nats(model, batch, counted).backward()
        for one in experts:
            E, f, d = one.weights.down_t.shape
            for name, shape in (("dh_sq", (E, f)), ("hdh_sq", (E, f)), ("m", (E, d, d)), ("h_sq", (E, f))):
                found.setdefault((one.site.layer, name), torch.zeros(shape, dtype=torch.float64))
            for t, e, h, y in one.rows:
                if counted.flatten()[t]:
                    dh, g = h.grad.double(), y.grad.double()
                    found[one.site.layer, "h_sq"][e] += h.detach().double() ** 2
                    found[one.site.layer, "dh_sq"][e] += dh**2
                    found[one.site.layer, "hdh_sq"][e] += (h.detach().double() * dh) ** 2
                    found[one.site.layer, "m"][e] += torch.outer(g, g)
    return found


def autograd_weights(source: Path, data: list[dict[str, Tensor]]) -> dict[int, Tensor]:
    """``g2 [C, E]`` of each layer, from the gradients that the model's own experts leave in their weights."""
    model = load(source)
    found = {site.layer: torch.zeros(2, site.num_experts, dtype=torch.float64) for site in sites(model)}
    for batch in data:
        for row in range(2):  # a row is a domain
            counted = batch["attention_mask"].bool()
            counted[1 - row] = False
            model.zero_grad()
            summed_nats(model, batch, counted).backward()
            for site in sites(model):
                for parameter in site.experts.parameters():
                    if parameter.shape[0] == site.num_experts and parameter.grad is not None:
                        found[site.layer][row] += parameter.grad.double().flatten(1).square().sum(1)
    return found


def close(mine: Tensor, theirs: Tensor, where: str, rel: float = 1e-4) -> None:
    scale = float(theirs.abs().max())
    assert scale > 0, where
    torch.testing.assert_close(mine, theirs, rtol=rel, atol=rel * 1e-2 * scale, msg=lambda m: f"{where}: {m}")


@pytest.mark.parametrize("family", families(*(one for one in FAMILIES if one not in REFUSED)))
def test_gradients_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    source, data = folder_of(family, tmp_path), batches(2)
    found = run(source, tmp_path / "s", batches=data)
    hidden, weights = autograd_hidden(source, data), autograd_weights(source, data)
    for layer in found.layers:
        for name in ("dh_sq", "hdh_sq"):
            close(found.get(layer, name), hidden[layer, name], f"{layer} {name}")
        close(found.tensors[layer, "g2"], weights[layer], f"{layer} g2")


@pytest.mark.parametrize("tied", [False, True])
def test_dense_layers_around_tied_embeddings_a_limit_and_small_chunks(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_backward, "LOGITS_BYTES", 1)  # one position at a time
    source = folder_of("qwen3_moe", tmp_path, num_hidden_layers=5, mlp_only_layers=[0, 2, 4], tie_word_embeddings=tied)
    found = run(source, tmp_path / "s", max_tokens=29)
    assert found.layers == [1, 3]
    assert found.meta.tokens == 29
    hidden = autograd_hidden(source, batches(), 29)
    for layer in found.layers:
        close(found.get(layer, "dh_sq"), hidden[layer, "dh_sq"], f"{layer}")


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_score_without_matrices_is_the_score_with_them(family: str, tmp_path: Path) -> None:
    source, data = folder_of(family, tmp_path), batches(2)
    found = run(source, tmp_path / "s", batches=data, collectors=[HiddenSums(), HiddenGradients()])
    whole = autograd_hidden(source, data)
    for site in sites(load(source)):
        layer, down = site.layer, weights_of(site).down_t.detach().double()
        n = found.get(layer, "n").clamp(min=1)[:, None].double()
        with_matrices = torch.einsum("ekd,edc,ekc->ek", down, whole[layer, "m"] / n[:, :, None], down)
        score = whole[layer, "h_sq"] / n * with_matrices
        close(found.get(layer, "h_sq") / n * found.get(layer, "dh_sq") / n, score, f"{layer}", 1e-4)


def test_in_bfloat16(tmp_path: Path) -> None:
    exact, rounded = folder_of("olmoe", tmp_path / "a"), folder_of("olmoe", tmp_path / "b", torch.bfloat16)
    a, b = run(exact, tmp_path / "sa", batches=batches(8)), run(rounded, tmp_path / "sb", batches=batches(8))
    for layer in a.layers:
        x, y = a.get(layer, "dh_sq").sum(1), b.get(layer, "dh_sq").sum(1)
        assert torch.corrcoef(torch.stack([x, y]))[0, 1] > 0.9
        assert 0.8 < float(y.sum() / x.sum()) < 1.25


def test_the_forward_gathers_what_it_would_without(tmp_path: Path) -> None:
    source = folder_of("qwen3_moe", tmp_path)
    alone = run(source, tmp_path / "a", collectors=[DownMax(), HiddenSums()])
    both = run(source, tmp_path / "b", collectors=[DownMax(), HiddenSums(), *GRADED])
    assert all(torch.equal(tensor, both.tensors[key]) for key, tensor in alone.tensors.items())
    assert_same(Statistics.load(tmp_path / "b"), both)
    assert not list(tmp_path.glob("*.partial*"))


def test_sums_of_two_passes_add_up(tmp_path: Path) -> None:
    source, data = folder_of("qwen3_moe", tmp_path), batches(4)
    parts = [run(source, tmp_path / f"s{i}", batches=data[2 * i : 2 * i + 2]) for i in range(2)]
    added, whole = parts[0].add(parts[1]), run(source, tmp_path / "s", batches=data)
    for key, tensor in whole.tensors.items():
        torch.testing.assert_close(added.tensors[key], tensor)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("qwen3_moe", tmp_path_factory.mktemp("models"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return run(model, tmp_path_factory.mktemp("whole") / "s")


def stop_at(step: int, share: float) -> Callable[[int, int, float], None]:
    def progress(done: int, steps: int, part: float) -> None:
        assert steps == 7  # three layers, the logits, three layers
        if done == step and part >= share:
            raise Stop

    return progress


@pytest.mark.parametrize(("step", "share"), [(1, 0.5), (3, 0), (3, 0.5), (4, 0), (4, 1), (5, 0.3), (6, 0), (6, 1)])
def test_a_run_that_was_cut_short_goes_on_with_its_step(
    step: int, share: float, model: Path, whole: Statistics, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        run(model, tmp_path / "s", progress=stop_at(step, share))
    seen: list[int] = []
    found = run(model, tmp_path / "s", progress=lambda done, steps, part: seen.append(done))
    assert min(seen) == step
    assert_same(found, whole)
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_a_run_that_was_only_not_written_is_written(
    model: Path, whole: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(stream, "add_up", stop)
        with pytest.raises(Stop):
            run(model, tmp_path / "s")
    left = sorted(file.name for file in (tmp_path / "s.partial").iterdir())
    assert left == sorted(
        ["run.json", *(f"{kind}-0000{n}.safetensors" for kind in ("backward", "layer") for n in range(3))]
    )
    assert_same(run(model, tmp_path / "s", progress=stop_at(0, 0)), whole)


def test_a_killed_run_goes_on(model: Path, whole: Statistics, tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from test_stream_backward import run
        def progress(done, steps, share):
            if done == 5 and share > 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
        run(Path(sys.argv[1]), Path(sys.argv[2]), progress=progress)
    """
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(code), str(model), str(tmp_path / "s")]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # of the inputs what the way back still needs, of the gradients the lowest, and what the kill left half-written
    left = {file.name for file in (tmp_path / "s.partial").glob("*.bin") if not file.name.startswith(".")}
    assert left == {"hidden-00000.bin", "hidden-00001.bin", "gradient-00002.bin"}
    seen: list[int] = []
    found = run(model, tmp_path / "s", progress=lambda done, steps, part: seen.append(done))
    assert min(seen) == 5
    assert_same(found, whole)


def test_missing_leftovers_are_noticed(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(model, tmp_path / "s", progress=stop_at(5, 0))
    for name in ("hidden-00000.bin", "backward-00002.safetensors", "layer-00001.safetensors"):
        file = tmp_path / "s.partial" / name
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(StatisticsError, match=f"{name} is missing"):
            run(model, tmp_path / "s")
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="differs in collectors"):
        run(model, tmp_path / "s", collectors=[DownMax()])
    run(model, tmp_path / "s", collectors=[DownMax()], resume=False)


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
    run(model, tmp_path / "s", progress=lambda done, steps, share: seen.append((done, share, real())))
    wanted = {0: [0], 1: [1], 2: [2], 3: [], 4: [2], 5: [1], 6: [0]}
    assert all(layers == (wanted[done] if share else []) for done, share, layers in seen)
    model_ = streamed[0].model
    assert real() == []
    assert model_.lm_head.weight.is_meta
    assert streamed[0].embedding.weight.is_meta
    assert not [name for name, p in model_.named_parameters() if p.grad is not None or p.requires_grad]


@pytest.mark.parametrize("family", families(*REFUSED))
def test_families_without_gradients_are_named_before_any_work(family: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFamilyError, match=f"gradients of family {family!r}.*common seam"):
        run(folder_of(family, tmp_path), tmp_path / "s")
    assert not (tmp_path / "s.partial").exists()


def test_a_pass_without_a_way_back_says_so(model: Path) -> None:
    register()
    with pytest.raises(ConfigError, match="needs gradients, which only"):
        collect(load(model), batches(), [HiddenGradients()], domains=DOMAINS)
