"""Taps: they see what the experts are told, change it where they say so, and are gone afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collegium.errors import ConfigError
from collegium.layer import MoE
from collegium.routing import Routing
from collegium.sites import GateInputs, Order, Recorder, Site, SwitchOff, register, sites, tap
from tiny import SEAM, needs, seam_model_type, tiny_inputs, tiny_model

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm", "collegium"]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def calls_of(site: Site) -> list[tuple[Any, ...]]:
    """Arguments of every experts call from now on, whoever made them."""
    calls: list[tuple[Any, ...]] = []
    site.experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    return calls


def outputs_of(site: Site) -> list[Tensor]:
    outputs: list[Tensor] = []
    site.experts.register_forward_hook(lambda module, args, output: outputs.append(output))
    return outputs


SCORES = {"softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid, "sqrtsoftplus": lambda z: F.softplus(z).sqrt()}


@torch.no_grad()
@pytest.mark.parametrize(("family", "experts_class"), SEAM, ids=[f"{f}-{c}" for f, c in SEAM])
def test_every_family_is_recorded_and_left_alone(family: str, experts_class: str) -> None:
    model = tiny_model(seam_model_type(family, experts_class))
    inputs = tiny_inputs(model)
    plain = model(**inputs, use_cache=False)[0]
    recorder, seen = Recorder(), []
    with tap(model, recorder, lambda site, x, routing: seen.append((site, x)) or routing, logits=True) as found:
        calls = {site.path: calls_of(site) for site in found}
        tapped = model(**inputs, use_cache=False)[0]
    assert torch.equal(tapped, plain), "a tap that changes nothing changed the output"
    assert len(seen) == sum(map(len, calls.values())) > 0
    for site, x in seen:
        (told_x, told_index, told_weight), (routing,) = calls[site.path][0], recorder.routings[site.path]
        assert torch.equal(x, told_x)
        index, weight = routing.to_topk(site.top_k)
        used = index < site.num_experts  # ZAYA marks its skip expert as expert 0 of weight 0
        assert torch.equal(index[used], told_index[used])
        assert torch.equal(weight, told_weight)
        assert not told_weight[~used].any()
        assert routing.logits is not None
        assert routing.logits.shape == (routing.num_tokens, site.num_experts)
        if family != "phimoe":  # its weights are softmaxes over sets of its own
            scale = getattr(site.gate, "per_expert_scale", torch.ones(site.num_experts))
            ratio = weight / (SCORES[site.score](routing.logits) * scale).gather(
                1, index.clamp(max=site.num_experts - 1)
            )
            torch.testing.assert_close(ratio[used], ratio[:, :1].expand_as(ratio)[used], rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("renormalise", [True, False])
def test_a_switched_off_expert_contributes_nothing(implementation: str, renormalise: bool) -> None:
    register()
    model = tiny_model("qwen3_moe")
    inputs = tiny_inputs(model)
    site = sites(model)[0]
    model.set_experts_implementation("eager")
    calls = calls_of(site)
    model(**inputs)
    x, index, weight = calls[0]
    off = [int(index[0, 0]), int(index[0, 1])]  # the first token loses both of its experts
    left = weight.masked_fill(torch.isin(index, torch.tensor(off)), 0.0)
    assert ((left == 0).sum(1) == 1).any()
    if renormalise:
        left = left * weight.sum(1, keepdim=True) / left.sum(1, keepdim=True).clamp(min=1e-9)
    expected = site.experts(x, index, left)

    model.set_experts_implementation(implementation)
    outputs = outputs_of(site)
    with tap(model, SwitchOff({0: off}, renormalise=renormalise)):
        model(**inputs)
    torch.testing.assert_close(outputs[0], expected, rtol=1e-4, atol=1e-5)
    assert not outputs[0][0].any()


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_may_get_more_fewer_or_no_experts(implementation: str) -> None:
    """Half the tokens go to all experts, half to none."""
    register()
    model = tiny_model("olmoe")
    site = sites(model)[0]
    model.set_experts_implementation(implementation)
    calls, outputs = calls_of(site), outputs_of(site)

    def reroute(site: Site, x: Tensor, routing: Routing) -> Routing | None:
        if site.layer == 1:
            return replace(routing, expert=routing.expert[:0], weight=routing.weight[:0], slots=None,
                           ragged_token=routing.token[:0])  # fmt: skip
        T, E = routing.num_tokens, routing.num_experts
        index = torch.arange(E).expand(T, E).clone()
        index[::2] = E
        return routing.with_assignments(index, torch.full((T, E), 0.25))

    with tap(model, reroute):
        model(**tiny_inputs(model))
    model.set_experts_implementation("eager")
    x = calls[0][0]
    T, E = x.shape[0], site.num_experts
    expected = site.experts(x, torch.arange(E).expand(T, E), torch.full((T, E), 0.25))
    expected[::2] = 0.0
    torch.testing.assert_close(outputs[0], expected, rtol=1e-4, atol=1e-5)
    # layer 1: no token has an expert
    with tap(model, reroute):
        last = outputs_of(sites(model)[1])
        model(**tiny_inputs(model))
    assert not last[0].any()


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4_text", "switch_transformers"])
def test_neutral_settings_are_bit_identical(model_type: str) -> None:
    model = tiny_model(model_type)
    inputs = tiny_inputs(model)
    plain = model(**inputs, use_cache=False)[0]
    recorder = Recorder()
    with tap(model, recorder):
        model(**inputs, use_cache=False)
    unused = {path: [] for path in recorder.routings}
    for path in unused:
        unused[path] = [int(e) for e in (recorder.counts(path) == 0).nonzero()]
    for neutral in (SwitchOff({}), SwitchOff(unused)):
        with tap(model, neutral):
            assert torch.equal(model(**inputs, use_cache=False)[0], plain)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "collegium"])
def test_generate(implementation: str) -> None:
    register()
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation(implementation)
    inputs = tiny_inputs(model, batch=2, length=5)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    plain = model.generate(**inputs, **settings)
    recorder = Recorder()
    with tap(model, recorder):
        assert torch.equal(model.generate(**inputs, **settings), plain)
    for routings in recorder.routings.values():
        assert [r.num_tokens for r in routings] == [10, 2, 2, 2]
    counts = {path: recorder.counts(path) for path in recorder.routings}
    favourite = {path: [int(count.argmax())] for path, count in counts.items()}
    after = Recorder()
    with tap(model, SwitchOff(favourite), after):
        model.generate(**inputs, **settings)
    for path, (expert,) in favourite.items():
        assert counts[path][expert] > 0
        assert after.counts(path)[expert] == 0


def marked(name: str, order: int | None, log: list[str]) -> Any:
    def one(site: Site, x: Tensor, routing: Routing) -> None:
        log.append(name)

    if order is not None:
        one.order = order  # type: ignore[attr-defined]
    return one


@torch.no_grad()
def test_order_is_fixed_whatever_the_nesting() -> None:
    model = tiny_model("mixtral", num_hidden_layers=1)
    log: list[str] = []
    reroute, observe = marked("reroute", Order.REROUTE, log), marked("observe", None, log)
    mask, offset, switch = (marked(n, o, log) for n, o in [("mask", 10), ("offset", 20), ("switch", Order.SWITCH)])
    with tap(model, observe, switch):
        with tap(model.model, reroute, mask):
            with tap(model, offset):
                model(**tiny_inputs(model))
            assert log == ["mask", "offset", "switch", "reroute", "observe"]
            log.clear()
            model(**tiny_inputs(model))
            assert log == ["mask", "switch", "reroute", "observe"]
        log.clear()
        model(**tiny_inputs(model))
        assert log == ["switch", "observe"]
    assert hooks(model) == 0
    assert sorted(Order) == [Order.MASK, Order.OFFSET, Order.CORE_SET, Order.TOP_K, Order.SWITCH, Order.REROUTE,
                             Order.OBSERVE]  # fmt: skip


@torch.no_grad()
def test_later_taps_see_what_earlier_ones_returned() -> None:
    model = tiny_model("mixtral", num_hidden_layers=1)
    recorder, switch = Recorder(), SwitchOff({0: [0, 1, 2, 3, 4, 5, 6]})
    with tap(model, recorder, switch):
        model(**tiny_inputs(model))
    (routing,) = recorder.routings["model.layers.0.mlp"]
    assert set(routing.expert.tolist()) == {7}


@torch.no_grad()
def test_an_exception_names_the_site_and_leaves_nothing_behind() -> None:
    model = tiny_model("mixtral")
    before = hooks(model)
    plain = model(**tiny_inputs(model))[0]

    def broken(site: Site, x: Tensor, routing: Routing) -> None:
        if site.layer == 1:
            raise ZeroDivisionError("oops")

    with pytest.raises(ZeroDivisionError, match="oops") as caught, tap(model, broken, GateInputs(), logits=True):
        model(**tiny_inputs(model))
    assert "broken at model.layers.1.mlp (layer 1)" in caught.value.__notes__[0]
    assert hooks(model) == before
    assert torch.equal(model(**tiny_inputs(model))[0], plain)


@torch.no_grad()
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda site, x, routing: x, "returned a Tensor"),
        (
            lambda site, x, routing: Routing.from_topk(routing.index_TK[1:], routing.weight_TK[1:], 8),
            "23 tokens over 8 experts; it was given 24 tokens over 8 experts",
        ),
    ],
)
def test_what_a_tap_returns_is_checked(wrong: Callable[..., Any], message: str) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(ConfigError, match=message), tap(model, wrong):
        model(**tiny_inputs(model))


def test_switching_off_what_is_not_there_is_refused() -> None:
    model = tiny_model("qwen3_moe")
    for experts, message in [({7: [0]}, "7 names 0 MoE blocks"), ({1: [3, 8]}, r"experts 0 to 7, not \[8\]")]:
        with pytest.raises(ConfigError, match=message), tap(model, SwitchOff(experts)):
            pass
    twice = pytest.raises(ConfigError, match=r"1 names 2 MoE blocks.*encoder.block.1.layer.1.mlp")
    with twice, tap(tiny_model("switch_transformers"), SwitchOff({1: [0]})):
        pass
    assert hooks(model) == 0


def logits_in(output: Any, position: int) -> Tensor:
    """``[T, E]``; Switch's classifier gives nothing else, nor did DeepSeek-V3's gate before transformers 5.13."""
    return (output if isinstance(output, Tensor) else output[position]).flatten(0, -2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "position"),
    [
        ("deepseek_v3", 0),
        ("llama4_text", 1),
        ("switch_transformers", 2),
    ],
)
def test_logits_are_the_gates_own_and_only_on_request(model_type: str, position: int) -> None:
    model = tiny_model(model_type)
    site = sites(model)[0]
    outputs: list[Any] = []
    gate = getattr(site.gate, "classifier", site.gate)
    gate.register_forward_hook(lambda module, args, output: outputs.append(logits_in(output, position)))
    for logits in (True, False):
        recorder = Recorder()
        with tap(model, recorder, logits=logits):
            model(**tiny_inputs(model))
        (routing,) = recorder.routings[site.path]
        assert (routing.logits is None) == (not logits)
        if routing.logits is not None:
            assert torch.equal(routing.logits, outputs[-1])


@needs("zaya")
@torch.no_grad()
def test_zayas_skipped_tokens_have_no_expert() -> None:
    model = tiny_model("zaya")
    site = sites(model)[1]
    biases = site.gate.balancing_biases
    outputs: list[Tensor] = []
    site.gate.register_forward_hook(lambda module, args, output: outputs.append(output[0].softmax(-1)))
    model(**tiny_inputs(model))
    biases[-1] = ((outputs[0] + biases)[:, :8].max(-1).values - outputs[0][:, 8]).median() + 1e-3
    recorder = Recorder()
    with tap(model, recorder):
        model(**tiny_inputs(model))
    chosen = (outputs[1] + biases).argmax(-1)
    skipped = chosen == 8
    assert 0 < skipped.sum() < 24
    (routing,) = recorder.routings[site.path]
    assert torch.equal(routing.token, (~skipped).nonzero()[:, 0])
    assert torch.equal(routing.expert, chosen[~skipped])


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "same"),
    [
        ("qwen3_moe", True),
        ("deepseek_v2", True),
        ("gemma4_text", False),
        pytest.param("zaya", True, marks=needs("zaya")),
    ],
)
def test_gate_inputs_are_what_the_gate_decides_on(model_type: str, same: bool) -> None:
    model = tiny_model(model_type)
    site = sites(model)[-1]
    seen: list[Tensor] = []
    # the router of DeepSeek-V2's block is the block itself before transformers 5.13, which does not call its gate
    gate = site.block if type(site.gate) is nn.Linear else site.gate
    gate.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).clone()))
    calls, inputs = calls_of(site), GateInputs(layers=[1])
    with tap(model, inputs):
        model(**tiny_inputs(model))
    assert list(inputs.inputs) == [site.path]
    (x,) = inputs.inputs[site.path]
    assert torch.equal(x, seen[0])
    assert torch.equal(x, calls[0][0]) == same


def test_gradients_pass_through_an_intervention() -> None:
    register()
    for implementation in IMPLEMENTATIONS:
        model = tiny_model("deepseek_v3")
        model.set_experts_implementation(implementation)
        with tap(model, SwitchOff({1: [0, 1, 2]})):
            model(**tiny_inputs(model))[0].square().sum().backward()
        site = sites(model)[0]
        grad = site.experts.down_proj.grad
        assert grad is not None
        assert not grad[:3].any()
        assert grad[3:].any()
        assert site.gate.weight.grad is not None
        assert torch.isfinite(site.gate.weight.grad).all()
        assert site.gate.weight.grad.any()


def test_our_own_layers() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = MoE(32, 8, 4, 2, shared=8)
        nn.init.normal_(layer.mlp.gate.weight)
    inputs = tiny_inputs(model)
    plain = model(**inputs)[0]
    recorder = Recorder()
    with tap(model, recorder, logits=True) as found:
        assert torch.equal(model(**inputs)[0], plain)
    assert not any(site.gate.keep_logits for site in found)
    for site in found:
        (routing,) = recorder.routings[site.path]
        assert routing.logits is not None
        assert routing.probs is not None
        torch.testing.assert_close(routing.logits.softmax(-1), routing.probs)
    site, outputs, after = found[1], outputs_of(found[1]), Recorder()
    off = recorder.routings[site.path][0].expert[:2].tolist()
    with tap(model, SwitchOff({1: off}), after):
        changed = model(**inputs)[0]
    assert not torch.equal(changed, plain)
    assert not outputs[0][0].any(), "the first token has no expert left"
    assert not set(off) & set(after.routings[site.path][0].expert.tolist())


@torch.no_grad()
def test_recorder_counts_every_forward() -> None:
    model = tiny_model("mixtral")
    recorder = Recorder()
    with tap(model, recorder):
        for seed in range(3):
            model(**tiny_inputs(model, seed=seed))
    for path, routings in recorder.routings.items():
        assert len(routings) == 3
        assert recorder.counts(path).sum() == 3 * 24 * 2
