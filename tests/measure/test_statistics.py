"""Statistics of a pass: what collectors see is what the model's experts did; passes add up; files are not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from collegium.errors import ConfigError, NonFiniteError, StatisticsError, UnsupportedFamilyError
from collegium.measure.collect import Counts, SiteBatch, SiteCollection, collect
from collegium.measure.redundancy import OutputCosine
from collegium.measure.statistics import META, TENSORS, Entry, Statistics
from collegium.measure.super_experts import DownMax
from collegium.sites import Recorder, Site, sites, tap
from tiny import families, tiny_model

LENGTH = 10
DOMAINS = ("code", "prose")


def batches(count: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
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


class Spy:
    """Keeps the batches, and the weighted sum of each token's experts: what the block must have computed."""

    name: ClassVar[str] = "spy"
    needs: ClassVar[frozenset[Any]] = frozenset({"outputs"})
    statistics: ClassVar[tuple[Entry, ...]] = ()

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.batches: list[SiteBatch] = []

    def start(self, site: Site) -> None:
        return None

    def update(self, state: None, batch: SiteBatch) -> None:
        scale = 1 if batch.site.scales_input else batch.weight[:, None]
        self.kept.append(torch.zeros_like(batch.x).index_add(0, batch.token, batch.outputs * scale))
        self.batches.append(batch)

    def finish(self, state: None) -> dict[str, Tensor]:
        return {}


def run(model: Any, *collectors: Any, **settings: Any) -> Statistics:
    return collect(model, settings.pop("batches", batches()), collectors, domains=DOMAINS, name="tiny", **settings)


@pytest.mark.parametrize(
    "family", families("qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "granitemoe", "nemotron_h")
)
def test_outputs_are_those_of_the_models_experts(family: str) -> None:
    model = tiny_model(family)
    spy, oracle = Spy(), []
    for site in sites(model):
        site.experts.register_forward_hook(lambda module, args, output: oracle.append(output))
    mine = [SiteCollection(site, [spy], 2) for site in sites(model)]
    by_path = {one.site.path: one for one in mine}
    (batch,) = batches(1)
    valid = batch["attention_mask"].reshape(-1).bool()
    zeros = torch.zeros(2 * LENGTH, dtype=torch.long)

    def feed(site: Site, x: Tensor, routing: Any) -> None:
        by_path[site.path].update(
            SiteBatch(site, x, routing, document=zeros, domain=zeros, position=zeros, valid=valid)
        )

    with torch.no_grad(), tap(model, feed):
        model(**{key: batch[key] for key in ("input_ids", "attention_mask")}, use_cache=False)
    assert len(spy.kept) == len(oracle) > 0
    for site, got, seen, told in zip(sites(model), spy.kept, spy.batches, oracle, strict=True):
        if site.scales_input:
            told = told.view(site.num_experts, 2 * LENGTH, -1).sum(0)
        torch.testing.assert_close(got[valid], told.reshape(got.shape)[valid], rtol=1e-4, atol=1e-5)
        assert not got[~valid].any()
        assert valid[seen.token].all()
        assert (seen.expert.diff() >= 0).all()
        assert seen.offsets.tolist() == [int((seen.expert < e).sum()) for e in range(site.num_experts + 1)]


def test_counts_are_those_of_the_routings_without_padding() -> None:
    model = tiny_model("qwen3_moe")
    recorder = Recorder()
    with tap(model, recorder):
        found = run(model, Counts())
    for site in sites(model):
        for code, domain in enumerate(DOMAINS):
            rows = slice(0, LENGTH) if code == 0 else slice(LENGTH, 2 * LENGTH - 4)
            index = torch.cat([routing.index_TK[rows].flatten() for routing in recorder.routings[site.path]])
            assert found.get(site.layer, "n", domain).tolist() == torch.bincount(index, minlength=8).tolist()
        assert found.get(site.layer, "n_tokens").item() == found.meta.tokens == 2 * (2 * LENGTH - 4)
        assert found.get(site.layer, "n").sum() == found.meta.tokens * site.top_k


def test_starved_experts_are_listed() -> None:
    found = run(tiny_model("qwen3_moe"))
    for one in found.coverage(minimum=8):
        assert one.starved == tuple(e for e in range(8) if one.tokens[e] < 8)
        assert one.starved
    assert all(not one.starved for one in found.coverage(minimum=0))


def test_passes_add_up_to_one_pass_over_both() -> None:
    model = tiny_model("qwen3_moe")
    first, second = batches(1, seed=0), batches(2, seed=1)
    collectors = DownMax(), OutputCosine()
    sum_ = run(model, *collectors, batches=first).add(run(model, *collectors, batches=second))
    both = run(model, *collectors, batches=first + second)
    assert sum_.meta.tokens == both.meta.tokens
    assert sum_.tensors.keys() == both.tensors.keys()
    for key, tensor in both.tensors.items():
        torch.testing.assert_close(sum_.tensors[key], tensor, rtol=1e-6, atol=1e-6)


def test_domains_are_joined_by_name() -> None:
    model = tiny_model("qwen3_moe")
    one = collect(model, batches(), [], domains=("code", "prose"), name="tiny")
    two = collect(model, batches(), [], domains=("prose", "maths"), name="tiny")
    both = one.add(two)
    assert both.meta.domains == ("code", "prose", "maths")
    assert both.get(0, "n", "code").equal(one.get(0, "n", "code"))
    assert both.get(0, "n", "prose").equal(one.get(0, "n", "prose") + two.get(0, "n", "prose"))
    assert both.get(0, "n", "maths").equal(two.get(0, "n", "maths"))


def test_passes_that_do_not_fit_are_not_added() -> None:
    model = tiny_model("qwen3_moe")
    plain = run(model)
    for other, what in [
        (run(tiny_model("qwen3_moe", num_local_experts=4)), "layers"),
        (run(model, DownMax()), "statistics"),
        (collect(model, batches(), [], domains=DOMAINS, name="another"), "model"),
        (run(model, fingerprint="1234"), "fingerprint"),
    ]:
        with pytest.raises(ConfigError, match=f"whose {what} differs"):
            plain.add(other)
    with pytest.raises(ConfigError, match="whose collectors differs"):
        run(model, OutputCosine(tokens=5)).add(run(model, OutputCosine(tokens=6)))


def test_a_pass_leaves_the_model_as_it_was_and_stops_at_max_tokens() -> None:
    model = tiny_model("qwen3_moe").train()
    seen: list[int] = []
    found = run(model, max_tokens=19, progress=seen.append)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.meta.tokens == 19
    assert seen == [16, 3]
    assert found.get(0, "n").sum() == 19 * 2


def test_a_damaged_weight_is_named() -> None:
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        sites(model)[1].experts.down_proj[:, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layer 1.*down_max"):
        run(model, DownMax())


def test_models_with_several_blocks_a_layer_are_refused() -> None:
    with pytest.raises(UnsupportedFamilyError, match="one MoE block a layer"):
        collect(tiny_model("nllb-moe"), [], [])


def test_two_collectors_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two collectors"):
        run(tiny_model("qwen3_moe"), DownMax(), DownMax())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    found = run(tiny_model("qwen3_moe"), DownMax(), OutputCosine(tokens=7))
    found.save(tmp_path / "s")
    return tmp_path / "s"


def test_what_is_saved_is_what_is_loaded(saved: Path) -> None:
    again = run(tiny_model("qwen3_moe"), DownMax(), OutputCosine(tokens=7))
    loaded = Statistics.load(saved)
    assert loaded.meta.model_copy(update={"created": again.meta.created}) == again.meta
    assert loaded.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(loaded.tensors[key], again.tensors[key]) for key in again.tensors)
    assert loaded.add(again).meta.tokens == 2 * again.meta.tokens
    again.save(saved)  # replaces its like


def rewrite(folder: Path, change: Any) -> None:
    body = json.loads((folder / META).read_text())
    change(body)
    (folder / META).write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(schema_version=2), "schema_version"),
        (lambda body: body.update(tokens="many"), "tokens"),
        (lambda body: body.update(code="import os"), "code"),
        (lambda body: body["layers"].reverse(), "ascend"),
        (lambda body: body["statistics"][2].update(merge="where"), "down_max"),
        (lambda body: body.update(tokens=3), "checksum"),
        (lambda body: body["layers"][0].update(num_experts=9), "checksum"),
    ],
)
def test_a_changed_meta_is_refused(saved: Path, change: Any, message: str) -> None:
    rewrite(saved, change)
    with pytest.raises(StatisticsError, match=message):
        Statistics.load(saved)


def test_damaged_and_missing_files_are_refused(saved: Path, tmp_path: Path) -> None:
    content = bytearray((saved / TENSORS).read_bytes())
    content[-3] ^= 1
    (saved / TENSORS).write_bytes(content)
    with pytest.raises(StatisticsError, match="checksum"):
        Statistics.load(saved)
    (saved / TENSORS).unlink()
    with pytest.raises(StatisticsError, match="has no"):
        Statistics.load(saved)
    (saved / META).write_text("[" * 100_000)
    with pytest.raises(StatisticsError, match="JSON"):
        Statistics.load(saved)
    with pytest.raises(StatisticsError, match="holds no statistics"):
        Statistics.load(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(7, dtype=torch.float64), r"\[7\]"),
        (torch.zeros(8), "float32"),
        (torch.full((8,), torch.nan, dtype=torch.float64), "NaN"),
    ],
)
def test_tensors_must_fit_the_meta(saved: Path, tensor: Tensor, message: str) -> None:
    found = Statistics.load(saved)
    with pytest.raises(StatisticsError, match=message):
        Statistics(found.meta, {**found.tensors, (0, "down_max"): tensor})
    without = {key: value for key, value in found.tensors.items() if key != (1, "n")}
    with pytest.raises(StatisticsError, match="'n' of layer 1 is missing"):
        Statistics(found.meta, without)


def test_another_folder_is_not_replaced(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="would replace"):
        Statistics.load(saved).save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_what_is_not_there_is_said(saved: Path) -> None:
    found = Statistics.load(saved)
    with pytest.raises(ConfigError, match="no statistic 'ean_sum'"):
        found.get(0, "ean_sum")
    with pytest.raises(ConfigError, match="not kept by domain"):
        found.get(0, "down_max", "code")
    with pytest.raises(ConfigError, match="the domains are"):
        found.get(0, "n", "poetry")


@torch.no_grad()
def test_the_largest_outputs_are_those_of_a_loop_over_tokens() -> None:
    model = tiny_model("qwen3_moe")
    recorder, inputs = Recorder(), {}
    with tap(model, recorder, lambda site, x, routing: inputs.setdefault(site.layer, []).append(x)):
        found = run(model, DownMax())
    for site in sites(model):
        best: dict[int, tuple[float, int, int]] = {}
        for x, routing in zip(inputs[site.layer], recorder.routings[site.path], strict=True):
            for t in range(2 * LENGTH - 4):
                for e in routing.index_TK[t].tolist():
                    gate, up = (site.experts.gate_up_proj[e] @ x[t]).chunk(2)
                    y = (site.experts.down_proj[e] @ (F.silu(gate) * up)).abs()
                    best[e] = max(best.get(e, (0.0, 0, 0)), (float(y.max()), int(y.argmax()), t % LENGTH))
        for e, (value, channel, position) in best.items():
            assert found.get(site.layer, "down_max")[e].item() == pytest.approx(value, rel=1e-4)
            assert found.get(site.layer, "down_argmax")[e].tolist() == [channel, position]
        for e in set(range(8)) - best.keys():
            assert found.get(site.layer, "down_max")[e] == 0
            assert found.get(site.layer, "down_argmax")[e].tolist() == [-1, -1]
