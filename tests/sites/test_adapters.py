"""Llama-4, Switch and NLLB-MoE: records are exactly what the model used, interventions take effect."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F

from collegium.routing import Routing
from collegium.sites import Recorder, Site, SwitchOff, sites, tap
from collegium.sites.adapters.nllb import _follows_gate
from tiny import tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:this release of transformers runs NLLB-MoE")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def block_io(site: Site) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs ``[T, d]`` of the routed experts of a site, over all forwards from now on."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        inputs.append(args[0].clone())
        outputs.append(output.clone())

    site.experts.register_forward_hook(keep)
    return inputs, outputs


# Llama-4


def llama4(top_k: int = 2) -> tuple[nn.Module, Site]:
    model = tiny_model("llama4_text", num_experts_per_tok=top_k)
    return model, sites(model)[0]


def llama4_routed(site: Site, x: Tensor, routing: Routing) -> Tensor:
    """``sum_k expert_k(weight_k * x)``, assignment by assignment."""
    experts: Any = site.experts
    out = torch.zeros_like(x)
    for token, expert, weight in zip(routing.token, routing.expert, routing.weight, strict=True):
        gate, up = (weight * x[token] @ experts.gate_up_proj[expert]).chunk(2)
        out[token] += (up * experts.act_fn(gate)) @ experts.down_proj[expert]
    return out


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_llama4_scores_are_recorded(top_k: int) -> None:
    model, site = llama4(top_k)
    inputs = tiny_inputs(model)
    plain = model(**inputs)[0]
    recorder, seen = Recorder(), []
    with tap(model, recorder, lambda site, x, routing: seen.append(x) or routing, logits=True):
        assert torch.equal(model(**inputs)[0], plain)
    (routing,) = recorder.routings[site.path]
    assert site.scales_input
    assert routing.logits is not None
    wanted = routing.logits.topk(top_k).indices
    assert torch.equal(routing.index_TK.sort().values, wanted.sort().values)
    torch.testing.assert_close(routing.weight_TK, routing.logits.gather(1, routing.index_TK).sigmoid())
    _, outputs = block_io(site)
    model(**inputs)
    torch.testing.assert_close(outputs[0].view(8, 24, 32).sum(0), llama4_routed(site, seen[0], routing))


@pytest.mark.parametrize("renormalise", [True, False])
def test_llama4_experts_switch_off(renormalise: bool) -> None:
    model, site = llama4()
    before, after, seen = Recorder(), Recorder(), []
    with tap(model, before):
        model(**tiny_inputs(model))
    off = before.routings[site.path][0].expert[:2].tolist()
    _, outputs = block_io(site)
    with tap(model, SwitchOff({0: off}, renormalise), after, lambda site, x, routing: seen.append(x)):
        model(**tiny_inputs(model))
    (routing,) = after.routings[site.path]
    assert not set(off) & set(routing.expert.tolist())
    routed = outputs[0].view(8, 24, 32).sum(0)
    assert not routed[0].any()
    torch.testing.assert_close(routed, llama4_routed(site, seen[0], routing))


# Switch Transformers


CAPACITY_COUNTS = Version(transformers.__version__) >= Version("5.18")
"""Before, transformers counted each token alone, and no expert was ever full."""


def switch(capacity: int) -> tuple[nn.Module, Site]:
    model = tiny_model("switch_transformers", expert_capacity=capacity)
    return model, sites(model)[0]


def tokens_seen(site: Site) -> dict[int, list[Tensor]]:
    """What each expert module is given from now on."""
    seen: dict[int, list[Tensor]] = {e: [] for e in range(site.num_experts)}
    for e in seen:
        expert = site.experts.get_submodule(f"expert_{e}")
        expert.register_forward_pre_hook(lambda module, args, e=e: seen[e].append(args[0]))
    return seen


@pytest.mark.parametrize("capacity", [1, 2, 64])
def test_switch_drops_are_recorded(capacity: int) -> None:
    model, site = switch(capacity)
    inputs = tiny_inputs(model)
    plain = model(**inputs)[0]
    seen = tokens_seen(site)
    recorder, x = Recorder(), []
    with tap(model, recorder, lambda site, view, routing: x.append(view) or routing, logits=True):
        assert torch.equal(model(**inputs)[0], plain)
    (routing,) = recorder.routings[site.path]
    assert routing.logits is not None
    kept = torch.ones(24, dtype=torch.bool) if routing.kept is None else routing.kept
    capacity = capacity if CAPACITY_COUNTS else 64
    assert (capacity < 64) == bool((~kept).any())
    # independent count: capacity is per sequence and expert, first come first served
    wanted = routing.logits.argmax(-1)
    place = torch.stack([F.one_hot(w, 8).cumsum(0)[torch.arange(12), w] for w in wanted.view(2, 12)]).view(-1)
    assert torch.equal(routing.expert, wanted)
    assert torch.equal(kept, place <= capacity)
    torch.testing.assert_close(routing.weight, routing.logits.softmax(-1).max(-1).values)
    for e, given in seen.items():
        rows = torch.cat(given) if given else torch.zeros(0, 32)
        assert torch.equal(rows, x[0][(routing.expert == e) & kept])


def test_switch_interventions_take_effect() -> None:
    model, site = switch(capacity=1)
    before = Recorder()
    with tap(model, before):
        model(**tiny_inputs(model))
    counts = before.counts(site.path).tolist()
    unused = next(e for e in range(8) if not counts[e] and counts[e - 1])
    seen, (inputs, outputs) = tokens_seen(site), block_io(site)

    def keep_all_twice(site: Site, x: Tensor, routing: Routing) -> Routing:
        """Nobody is dropped, and everybody gets the next expert too."""
        index = torch.stack([routing.expert, (routing.expert + 1) % 8], 1)
        return routing.with_assignments(index, torch.stack([routing.weight, routing.weight / 2], 1))

    after = Recorder()
    with tap(model, keep_all_twice, after, SwitchOff({site.path: [unused]}, renormalise=False)):
        model(**tiny_inputs(model))
    # SwitchOff comes first whatever the order of entering, so its expert is back as somebody's next one
    (routing,) = after.routings[site.path]
    assert routing.slots == 2
    assert unused in routing.expert
    x, expected = inputs[0], torch.zeros(24, 32)
    for token, expert, weight in zip(routing.token, routing.expert, routing.weight, strict=True):
        expected[token] += weight * site.experts.get_submodule(f"expert_{expert}")(x[token])
    torch.testing.assert_close(outputs[0], expected, rtol=1e-4, atol=1e-5)
    assert sum(map(len, seen.values())) > 0


def test_switch_experts_switch_off() -> None:
    model, site = switch(capacity=64)
    recorder = Recorder()
    with tap(model, recorder):
        model(**tiny_inputs(model))
    off = int(recorder.counts(site.path).argmax())
    _, outputs = block_io(site)
    model(**tiny_inputs(model))
    with tap(model, SwitchOff({site.path: [off]})):
        model(**tiny_inputs(model))
    plain, changed = outputs
    gone = recorder.routings[site.path][0].expert == off
    assert plain[gone].any(1).all()
    assert not changed[gone].any()
    assert torch.equal(changed[~gone], plain[~gone])


# NLLB-MoE


def nllb(**settings: Any) -> tuple[nn.Module, Site]:
    model = tiny_model("nllb-moe", moe_token_dropout=0.0, **settings)
    return model, sites(model)[0]


def record_nllb(model: nn.Module, site: Site) -> tuple[Routing, tuple[Any, ...], Any]:
    """The routing of the first forward, the arguments of the experts call, and the gate's output."""
    calls: list[Any] = []
    gates: list[Any] = []
    site.experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    site.gate.register_forward_hook(lambda module, args, output: gates.append(output))
    recorder = Recorder()
    torch.manual_seed(3)
    with tap(model, recorder):
        model(**tiny_inputs(model))
    return recorder.routings[site.path][0], calls[0], gates[0]


@pytest.mark.parametrize("policy", ["all", "sampling", "random"])
@pytest.mark.parametrize("fraction", [1.0, 0.1])
@pytest.mark.parametrize("prioritised", [False, True])
def test_nllb_drops_are_recorded(policy: str, fraction: float, prioritised: bool) -> None:
    model, site = nllb(
        second_expert_policy=policy,
        moe_eval_capacity_token_fraction=fraction,
        batch_prioritized_routing=prioritised,
    )
    torch.manual_seed(3)
    plain = model(**tiny_inputs(model))[0]
    torch.manual_seed(3)
    with tap(model, lambda site, x, routing: routing, logits=True):
        assert torch.equal(model(**tiny_inputs(model))[0], plain)
    routing, (x, first, weight), _ = record_nllb(model, site)
    kept = torch.ones(48, dtype=torch.bool) if routing.kept is None else routing.kept
    assert bool((~kept).any()) == (fraction < 1 or policy == "random")
    # the record rebuilds exactly what the experts were given
    dense = torch.zeros_like(weight).index_put((routing.token[kept], routing.expert[kept]), routing.weight[kept])
    assert torch.equal(dense, weight)
    is_first = torch.arange(48) % 2 == 0
    mask = torch.zeros_like(first)
    mask[routing.token[kept & is_first], routing.expert[kept & is_first]] = 1
    assert torch.equal(mask, first)
    # and what was wanted is what the gate gives when nothing is dropped
    logits = site.gate.classifier(x)
    assert torch.equal(routing.index_TK[:, 0], logits.argmax(-1))
    if policy == "all":
        assert torch.equal(routing.index_TK, logits.topk(2).indices)
    # capacity: no expert has more than its share
    assert routing.counts("kept").max() <= max(1, -(-int(fraction * 240) // 10))


def test_nllb_sampled_second_choices_are_the_sampled_ones() -> None:
    """With noise on the second choice the gate returns noisy logits; the first choice is from before the noise."""
    model, site = nllb(second_expert_policy="sampling")
    routing, (_, _, weight), gate = record_nllb(model, site)
    assert not torch.equal(routing.index_TK, gate[2].topk(2).indices)
    assert torch.equal((weight != 0).nonzero()[:, 1].view(24, 2), routing.index_TK.sort().values)


def nllb_expected(site: Site, x: Tensor, weights: dict[tuple[int, int], tuple[float, bool]]) -> Tensor:
    """The block's output for ``(token, expert) -> (weight, is the token's first choice)``."""
    follows = _follows_gate(type(site.experts))
    out = torch.zeros_like(x)
    for (token, expert), (weight, is_first) in weights.items():
        runs = expert if follows else int(is_first)
        out[token] += weight * site.experts.get_submodule(f"expert_{runs}")(x[token])
    return out


@pytest.mark.parametrize("renormalise", [True, False])
def test_nllb_experts_switch_off(renormalise: bool) -> None:
    model, site = nllb(moe_eval_capacity_token_fraction=0.2)
    routing, _, _ = record_nllb(model, site)
    off = routing.index_TK[0].tolist()
    kept = torch.ones(48, dtype=torch.bool) if routing.kept is None else routing.kept
    inputs, outputs = block_io(site)
    with tap(model, SwitchOff({site.path: off}, renormalise)):
        model(**tiny_inputs(model))
    weights = {}
    for token in range(24):
        alive = [(k, 2 * token + k) for k in range(2) if kept[2 * token + k]]
        before = sum(float(routing.weight[a]) for _, a in alive)
        alive = [(k, a) for k, a in alive if int(routing.expert[a]) not in off]
        after = sum(float(routing.weight[a]) for _, a in alive)
        for k, a in alive:
            factor = before / after if renormalise else 1.0
            weights[token, int(routing.expert[a])] = (float(routing.weight[a]) * factor, k == 0)
    assert not outputs[0][0].any()
    torch.testing.assert_close(outputs[0], nllb_expected(site, inputs[0], weights), rtol=1e-4, atol=1e-5)


def test_nllb_tokens_can_be_rerouted() -> None:
    model, site = nllb()
    inputs, outputs = block_io(site)

    def move(site: Site, x: Tensor, routing: Routing) -> Routing:
        return replace(routing, expert=(routing.expert + 1) % 8)

    after = Recorder()
    with tap(model, move, after):
        model(**tiny_inputs(model))
    (routing,) = after.routings[site.path]
    original = (routing.expert - 1) % 8
    seconds = original.view(24, 2)[:, 1]
    weights = {
        (int(t), int(e)): (float(w), int(e) != int(seconds[t]))
        for t, e, w in zip(routing.token, routing.expert, routing.weight, strict=True)
    }
    torch.testing.assert_close(outputs[0], nllb_expected(site, inputs[0], weights), rtol=1e-4, atol=1e-5)


def test_nllb_warns_exactly_if_other_experts_run_than_the_gate_chose() -> None:
    model, site = nllb()
    seen = tokens_seen(site)
    recorder = Recorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tap(model, recorder):
            model(**tiny_inputs(model))
    ran = {e for e, given in seen.items() if given}
    chosen = set(recorder.routings[site.path][0].expert.tolist())
    assert len(chosen) > 2
    assert any("experts 0 and 1 whatever the gate decides" in str(w.message) for w in caught) == (ran != chosen)


@pytest.mark.parametrize("model_type", ["nllb-moe", "switch_transformers"])
def test_encoder_and_decoder_under_generate(model_type: str) -> None:
    model = tiny_model(model_type)
    inputs = {"input_ids": tiny_inputs(model)["input_ids"]}
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "decoder_start_token_id": 0}
    plain = model.generate(**inputs, **settings)
    recorder = Recorder()
    with tap(model, recorder) as found:
        assert torch.equal(model.generate(**inputs, **settings), plain)
    encoder, decoder = found
    assert [r.num_tokens for r in recorder.routings[encoder.path]] == [24]
    assert [r.num_tokens for r in recorder.routings[decoder.path]] == [2, 2, 2]
