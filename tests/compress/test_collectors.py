"""What the collectors gather is what one computes token by token from the model's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shrinking import batches
from torch import Tensor

from collegium.compress.collectors import (
    COLLECTORS,
    DEFAULTS,
    HiddenSums,
    OutputMean,
    OutputNormMax,
    OutputNorms,
    ResidualTurn,
    RouterSums,
    collectors_for,
)
from collegium.compress.importance import importances
from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.measure.collect import collect, weights_of
from collegium.measure.residual import Residuals
from collegium.measure.statistics import Statistics
from collegium.routing import Routing
from collegium.sites import Site, sites, tap
from tiny import tiny_model

DOMAINS = ("code", "prose")
EVERY = [RouterSums(), OutputNorms(), OutputNormMax(), OutputMean(), HiddenSums(), ResidualTurn()]


def run(model: Any, *collectors: Any, **settings: Any) -> Statistics:
    given = settings.pop("batches", batches())
    return collect(model, given, collectors, domains=DOMAINS, name="tiny", **settings)


class Seen:
    """Inputs and routings of every block, forward by forward."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.routings: dict[str, list[Routing]] = {}

    def __call__(self, site: Site, x: Tensor, routing: Routing) -> None:
        self.inputs.setdefault(site.path, []).append(x)
        self.routings.setdefault(site.path, []).append(routing)


class Layers:
    """Input and output of the decoder layers, and output of the MoE blocks, as the model computes them."""

    def __init__(self, model: Any) -> None:
        self.seen: dict[str, list[Tensor]] = {}
        for site in sites(model):
            layer = model.get_submodule(site.path.rpartition(".")[0])
            for name, module in (("layer", layer), ("block", site.block)):
                module.register_forward_hook(self.keep(f"{site.layer}.{name}"))

    def keep(self, key: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.seen.setdefault(key, []).append(output[0] if isinstance(output, tuple) else output)

        return hook


def outputs_of(site: Any, x: Tensor, weight: Tensor) -> Tensor:
    """``[E, T, d]`` of every expert on every token, by the model's own experts module."""
    E, T = site.num_experts, len(x)
    if site.scales_input:
        dense = (x[None] * weight[:, :, None]).reshape(E * T, -1)
        return site.experts(dense).view(E, T, -1)
    ones = torch.ones(T, 1)
    return torch.stack([site.experts(x, torch.full((T, 1), e), ones) for e in range(E)])


def hidden_of(site: Any, x: Tensor, weight: Tensor) -> Tensor:
    """``[E, T, f]`` what goes into the down projection of every expert, of every token."""
    weights = weights_of(site)
    scale = weight[:, :, None] if site.scales_input else torch.ones(1)
    up = torch.bmm(x[None] * scale.expand(site.num_experts, len(x), 1), weights.up_t)
    return weights.activation(up if weights.up_bias is None else up + weights.up_bias[:, None])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "ernie4_5_moe"])
def test_they_are_sums_over_the_tokens_of_each_expert(family: str) -> None:
    model = tiny_model(family)
    recorder, given = Seen(), batches()
    layers = Layers(model)
    with tap(model, recorder, logits=True):
        found = run(model, *EVERY, batches=given)
    valid = torch.cat([batch["attention_mask"].flatten().bool() for batch in given])
    domain = torch.cat([batch["domain"][:, None].expand(2, 10).flatten() for batch in given])
    position = torch.arange(10).repeat(2 * len(given))
    for site in sites(model):
        x = torch.cat(recorder.inputs[site.path])
        routings = recorder.routings[site.path]
        logits = torch.cat([one.logits for one in routings])
        E, T = site.num_experts, len(x)
        weight = torch.zeros(E, T)
        routed = torch.zeros(E, T, dtype=torch.bool)
        for t in range(T):
            one, row = routings[t // 20], t % 20
            for e, w in zip(one.index_TK[row].tolist(), one.weight_TK[row].tolist(), strict=True):
                weight[e, t], routed[e, t] = w, True
        with torch.no_grad():
            y, h = outputs_of(site, x, weight), hidden_of(site, x, weight)
        norm, used = y.norm(dim=2), torch.ones(E, T) if site.scales_input else weight
        p = (logits.sigmoid() if site.score == "sigmoid" else logits.softmax(1)).T
        z = torch.zeros(E, T)
        for t in range(T):
            for e in logits[t].topk(site.top_k).indices.tolist():
                z[e, t] = logits[t, e]
        whole = torch.cat([one.reshape(20, -1) for one in layers.seen[f"{site.layer}.layer"]])
        block = torch.cat([one.reshape(20, -1) for one in layers.seen[f"{site.layer}.block"]])
        u = whole - block
        r = (y * (used * routed)[:, :, None]).sum(0)
        turn = (1 - torch.cosine_similarity(u, u + r)).clamp(min=0) * (position > 0)
        for code, name in enumerate(DOMAINS):
            here = valid & (domain == code)
            live = routed & here
            expected = {
                "w_sum": (weight * live).sum(1),
                "w_share_sum": (weight / weight.sum(0) * live).sum(1),
                "p_sum": (p * here).sum(1),
                "z_topk_sum": (z * here).sum(1),
                "ean_sum": (norm * live).sum(1),
                "ean_sq_sum": (norm**2 * live).sum(1),
                "w_ean_sum": (norm * used * live).sum(1),
                "easy_sum": (norm * used * live * turn).sum(1),
            }
            for key, value in expected.items():
                got = found.get(site.layer, key, name).float()
                torch.testing.assert_close(got, value, rtol=2e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
        live = routed & valid
        torch.testing.assert_close(
            found.get(site.layer, "ean_max").float(), (norm * live).amax(1), rtol=1e-3, atol=1e-5
        )
        total = (y * live[:, :, None]).sum(1)
        torch.testing.assert_close(found.get(site.layer, "out_sum").float(), total, rtol=1e-3, atol=1e-4)
        for key, value in (("h_sq", h**2), ("h_abs", h.abs())):
            total = (value * live[:, :, None]).sum(1)
            torch.testing.assert_close(found.get(site.layer, key).float(), total, rtol=1e-3, atol=1e-5)


FAMILIES = ["mixtral", "olmoe", "qwen2_moe", "deepseek_v2", "glm4_moe", "minimax_m2", "hunyuan_v1_moe", "lfm2_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_is_what_the_block_is_added_to(family: str) -> None:
    model = tiny_model(family)
    layers, streams = Layers(model), {}
    with Residuals(model, sites(model)) as residuals:

        def look(site: Any, x: Tensor, routing: Any) -> None:
            streams[site.layer] = residuals.take(site)

        with torch.no_grad(), tap(model, look):
            model(batches()[0]["input_ids"], use_cache=False)
    assert len(streams) == len(sites(model))
    for layer, stream in streams.items():
        total = stream.view(2, 10, -1) + layers.seen[f"{layer}.block"][0].view(2, 10, -1)
        torch.testing.assert_close(total, layers.seen[f"{layer}.layer"][0], rtol=1e-5, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_family_without_a_norm_before_the_block_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedFamilyError, match=r"flex_olmo.*EASY-EP"):
        run(tiny_model("flex_olmo"), ResidualTurn())


def test_first_tokens_do_not_count_for_easy_ep() -> None:
    model = tiny_model("qwen3_moe")
    with_first = run(model, ResidualTurn(skip=0)).get(0, "easy_sum")
    without = run(model, ResidualTurn()).get(0, "easy_sum")
    assert (without <= with_first).all()
    assert without.sum() < with_first.sum()
    assert not run(model, ResidualTurn(skip=10)).get(0, "easy_sum").any()


def test_slots_and_share_of_tcess() -> None:
    model = tiny_model("qwen3_moe")
    recorder = Seen()
    with tap(model, recorder, logits=True):
        run(model, RouterSums())
    site = sites(model)[0]
    valid = torch.cat([batch["attention_mask"].flatten().bool() for batch in batches()])
    logits = torch.cat([one.logits for one in recorder.routings[site.path]])[valid]
    first = torch.zeros(8).index_add(0, logits.argmax(1), logits.amax(1))
    torch.testing.assert_close(run(model, RouterSums(slots=1)).get(0, "z_topk_sum").float(), first)
    two = logits.topk(2, dim=1)
    sure = torch.where(two.values.softmax(1) >= 0.6, two.values, 0)
    expected = torch.zeros(8).index_add(0, two.indices.flatten(), sure.flatten())
    torch.testing.assert_close(run(model, RouterSums(share=0.6)).get(0, "z_topk_sum").float(), expected)
    assert not expected.equal(first)
    with pytest.raises(ConfigError, match="slots"):
        RouterSums(slots=0)


def test_passes_add_up_to_one_pass_over_both() -> None:
    model = tiny_model("qwen3_moe")
    first, second = batches(1, seed=0), batches(2, seed=1)
    added = run(model, *EVERY, batches=first).add(run(model, *EVERY, batches=second))
    both = run(model, *EVERY, batches=first + second)
    assert added.tensors.keys() == both.tensors.keys()
    for key, tensor in both.tensors.items():
        torch.testing.assert_close(added.tensors[key], tensor, rtol=1e-6, atol=1e-6)


def test_the_defaults_are_small_and_need_one_forward() -> None:
    every = run(tiny_model("qwen3_moe"), *(one() for one in DEFAULTS))
    assert list(every.meta.collectors) == [one.name for one in DEFAULTS]
    large = {"output_mean", "input_sample", "input_moment"}
    assert {one.name for one in COLLECTORS} - {one.name for one in DEFAULTS} == large | {
        "leave_one_out",
        "out_cos",
        "hidden_gradients",
        "weight_gradients",
    }


def test_an_unknown_score_is_refused_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collegium.sites.find.score_of", lambda family, config: "unknown")
    with pytest.raises(UnsupportedFamilyError, match="score 'unknown'"):
        run(tiny_model("mixtral"), RouterSums())


def test_collectors_for_gather_exactly_what_the_scores_need() -> None:
    for one in importances():
        gathered = {entry.name for collector in collectors_for(one.name) for entry in collector.statistics}
        assert set(one.needs) | {"down_max"} <= gathered
    assert [one.name for one in collectors_for("reap")] == ["counts", "output_norms", "down_max"]
    everything = {one.name for one in collectors_for(*(one.name for one in importances()))}
    assert {"leave_one_out", "ballots", "weight_gradients"} < everything < {one.name for one in COLLECTORS}
    with pytest.raises(ConfigError, match="no importance"):
        collectors_for("magic")
    assert [one.name for one in collectors_for(statistics=["c_in", "x_sample"])] == [
        "down_max",
        "input_sample",
        "input_moment",
    ]
    with pytest.raises(ConfigError, match="gathers the statistic 'magic'"):
        collectors_for(statistics=["magic"])
