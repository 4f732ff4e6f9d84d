"""Every published system inside whole transformers models: trained, saved, traced, measured, decoded with a cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import LENGTH, PLAIN, ROWS, SYSTEMS, context, counted, forget, fresh, parts, shaken
from torch import Tensor

from collegium import models
from collegium.decode.ragged import RaggedStep, unbatched_reason
from collegium.errors import ConfigError, UnsupportedFamilyError
from collegium.layer import balance_losses, moe_layers, use_context
from collegium.measure import load
from collegium.routing import Routing
from collegium.trace import record
from tiny import SEAM, seam_model_type, tiny_inputs, tiny_model

FAMILIES = ("qwen3", "llama", "olmoe", "gpt_oss")
"""Two dense, two with experts of their own; gpt-oss has sinks and a sliding window, too."""

everywhere = [
    pytest.mark.parametrize("system", SYSTEMS),
    pytest.mark.parametrize("family", FAMILIES),
]


def in_all(test: Any) -> Any:
    for mark in everywhere:
        test = mark(test)
    return test


def ids_of(model: Any) -> Tensor:
    return tiny_inputs(model, ROWS, LENGTH)["input_ids"]


def output(result: Any) -> Tensor:
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


@torch.no_grad()
def steps(model: Any, ids: Tensor, prompt: int, name: str = "input_ids") -> Tensor:
    """What comes out after a prompt and after each further token, with a cache."""
    found = model(**{name: ids[:, :prompt]}, use_cache=True)
    last = [output(found)[:, -1]]
    for at in range(prompt, ids.shape[1]):
        found = model(**{name: ids[:, at : at + 1]}, past_key_values=found.past_key_values, use_cache=True)
        last.append(output(found)[:, -1])
    return torch.stack(last, 1)


# ---- training, saving ------------------------------------------------------------------------------------------------


@in_all
def test_a_training_step_is_finite_and_reaches_every_parameter(family: str, system: str) -> None:
    model = shaken(family, system).train()
    ids = ids_of(model)
    with use_context(model, context()):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        balance = balance_losses(model)
        (loss + sum(balance.values())).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    counts = [counted(layer) for layer in moe_layers(model)]
    forget(model)
    assert loss.isfinite()
    assert all(value.isfinite() for value in balance.values())
    unreached = {name for name, grad in grads.items() if grad is None}
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)
    # the first layer has none before it, and a router that is never asked learns nothing
    expected = {name for name in grads if ".layers.0." in name and ".gating_residual." in name}
    if not all(part.learns for part in parts(model)):
        expected |= {name for name in grads if name.endswith(".gate.weight")}
    assert unreached == expected
    for name, grad in grads.items():
        if "gate." in name and grad is not None:
            assert grad.abs().sum() > 0, name
    for layer, found in zip(moe_layers(model), counts, strict=True):
        assert torch.equal(found, sum(routing.counts("assigned") for routing in layer.routings))
        assert found.sum() > 0


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_a_step_whose_choice_is_a_plan_teaches_the_router_nothing_and_goes_on(probability: float) -> None:
    model = fresh("qwen3", {"ssr": {"probability": probability}}).train()
    ids, planned, learnt = ids_of(model), set(), set()
    for step in range(6):
        with use_context(model, context(step)):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            assert balance_losses(model) == {}
            loss.backward()
        for layer in moe_layers(model):
            assert layer.last is not None
            assert layer.last.probs is not None
            (learnt if layer.last.probs.requires_grad else planned).add((step, layer.layer_index))
            assert (layer.gate.weight.grad is not None) == ((step, layer.layer_index) in learnt)
        model.zero_grad(set_to_none=True)
    assert (bool(learnt), bool(planned)) == (probability < 1, probability > 0)


@in_all
def test_saved_and_loaded_is_the_same_to_the_bit(family: str, system: str, tmp_path: Path) -> None:
    model = shaken(family, system)
    ids = ids_of(model)
    models.save(model, tmp_path / "model")
    again = models.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


# ---- traces ----------------------------------------------------------------------------------------------------------


@in_all
def test_a_trace_holds_what_the_layers_decided(family: str, system: str, tmp_path: Path) -> None:
    model = shaken(family, system)
    seen: dict[int, list[Routing]] = {layer.layer_index: [] for layer in moe_layers(model)}
    handles = [
        gate.register_forward_hook(lambda _, __, routing, at=layer.layer_index: seen[at].append(routing))
        for layer in moe_layers(model)
        for gate in layer.gates
    ]
    trace = record(model, [{"input_ids": ids_of(model)}], tmp_path / "trace")
    for handle in handles:
        handle.remove()
    assert len(trace) == ROWS * LENGTH
    found = load(trace)
    assert [one.layer for one in found] == list(seen)
    for one in found:
        own = sum(routing.counts("true") for routing in seen[one.layer])
        assert one.counts.tolist() == own.tolist()
        assert own.sum() > 0
        assert one.share.sum() == pytest.approx(1)
        assert np.isfinite([one.max_violation.value, one.cv.value, one.entropy.value]).all()
        weights = sum(routing.only_true().weight.double().sum() for routing in seen[one.layer])
        assert trace.weights(one.layer).astype(float).sum() == pytest.approx(float(weights), rel=1e-3)
        assert trace.meta.layer(one.layer).iterations == len(seen[one.layer])


# ---- decoding --------------------------------------------------------------------------------------------------------


@in_all
def test_with_a_cache_as_without_or_refused(family: str, system: str) -> None:
    model = shaken(family, system)
    ids = ids_of(model)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    blind = [type(part).__name__ for part in parts(model) if not (part.causal or part.remembers)]
    if blind:
        with pytest.raises(ConfigError, match=f"{blind[0]} lets a token's routing depend on later tokens"):
            steps(model, ids, 5)
        return
    for prompt in (1, 5, 11):
        torch.testing.assert_close(steps(model, ids, prompt), whole[:, prompt - 1 :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "router",
    [
        {"thor": {"inference": "sequence"}},
        {"thor": {"inference": "ensemble"}},
        {"graph_of_tokens": {"by": "similarity", "share": 0.5}},
        {"deepseek_moe": {"segments": 2, "shared": 2}},
    ],
    ids=str,
)
def test_other_settings_with_a_cache_as_without(router: Any) -> None:
    model = fresh("qwen3", router).eval()
    ids = ids_of(model)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(steps(model, ids, 5), whole[:, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_sequences_that_share_a_forward_do_not_mix_or_there_is_a_reason(system: str) -> None:
    model = shaken("qwen3", system)
    ids = ids_of(model)
    keeps = [part for part in parts(model) if part.remembers]
    reason = unbatched_reason(model)
    assert (reason is not None) == bool(keeps), reason
    if reason is not None:
        assert "keep what they saw" in reason
        return
    rows = ((0, 5), (1, 8))
    with torch.no_grad():
        caches = [model(input_ids=ids[row : row + 1, :end], use_cache=True).past_key_values for row, end in rows]
        if not all(part.causal for part in parts(model)):
            with pytest.raises(ConfigError, match="later tokens"):
                RaggedStep(model)([int(ids[row, end]) for row, end in rows], caches)
            return
        together = RaggedStep(model)([int(ids[row, end]) for row, end in rows], caches)
        alone = [model(input_ids=ids[row : row + 1, : end + 1]).logits[0, -1] for row, end in rows]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_what_is_drawn_by_position_knows_where_it_stands() -> None:
    model = shaken("qwen3", "thor")
    ids = ids_of(model)[:1]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        position = (mask.cumsum(1) - 1).clamp(min=0)
        behind = model(input_ids=padded, attention_mask=mask, position_ids=position).logits[:, 3:]
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(behind, whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(embedded, whole)
    # a block on its own is not told, whatever ran before
    assert all(layer.position is None for layer in moe_layers(model))


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "gemma2"])
def test_an_average_by_attention_has_the_weights_of_the_attention(family: str) -> None:
    """Grouped heads; sinks and a window; capped scores and a scale."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    models.install(model, models.MoEConfig.model_validate({**PLAIN, "router": "graph_of_tokens"}))
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in moe_layers(model):
        layer.gate.reset_parameters(0.5)
        layer.gate.register_forward_hook(lambda gate, args, routing: seen.append((gate.logits(args[0]), routing.probs)))
    with torch.no_grad():
        found = model(input_ids=ids_of(model), output_attentions=True)
    assert len(seen) == len(found.attentions) == 2
    for weights, (logits, probs) in zip(found.attentions, seen, strict=True):
        own = logits.softmax(-1).view(ROWS, LENGTH, -1)
        torch.testing.assert_close(probs.view_as(own), weights.mean(1) @ own)


@pytest.mark.parametrize("router", ["graph_of_tokens", {"graph_of_tokens": {"by": "similarity"}}, "thor"], ids=str)
def test_a_copy_of_a_model_decodes_by_itself(router: Any) -> None:
    model = fresh("qwen3", router).eval()
    again = copy.deepcopy(model)
    ids = ids_of(model)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.k_proj.weight.zero_()
    del model
    torch.testing.assert_close(steps(again, ids, 5), whole[:, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", ["attention", "similarity"])
def test_a_cache_that_lost_tokens_is_refused(by: str) -> None:
    model = fresh("qwen3", {"graph_of_tokens": {"by": by}}).eval()
    ids = ids_of(model)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        cache.crop(-2)
        with pytest.raises(ConfigError, match="holds 3 tokens, of which these routers have seen 5"):
            model(input_ids=ids[:, 5:6], past_key_values=cache)


# ---- every family ----------------------------------------------------------------------------------------------------

DENSE = ("llama", "qwen3", "olmo2", "gemma2", "gemma3_text", "mistral", "phi3")
CANNOT_TAKE = {
    "deepseek_v4": "takes input_ids",
    "ernie4_5_vl_moe": "takes moe_mm_token_type_ids",
    "nemotron_h": "no feed-forward block",
    "zaya": "takes prev_router_hidden_states",
}
"""Families whose decoder layers can hold no block of ours."""
CANNOT_AVERAGE = {
    **dict.fromkeys(
        ("granitemoehybrid", "jamba", "lfm2_moe", "qwen3_5_moe", "qwen3_next", "qwen4_exp"), "no self_attn"
    ),
    **dict.fromkeys(
        ("bailing_hybrid", "glm5_next", "inkling", "inkling2", "kimi_linear", "minimax"), "attention interface"
    ),
    **dict.fromkeys(
        ("axk2", "deepseek_v32", "dots3_note", "glm_moe_dsa", "hy_v4", "minimax_m3_vl", "mistral_large4"),
        "masks tokens itself",
    ),
}
"""Families whose attention is none, or none that a router could average by."""
OTHER_WITH_A_CACHE = {
    "axk2", "deepseek_v32", "dots3_note", "glm5_next", "glm_moe_dsa", "hy_v4", "mistral_large4", "unlimited_ocr",
}  # fmt: skip
"""Families whose own models give other outputs with a cache (their attention picks tokens, or its cache drops some)."""

EVERY = [pytest.param(family, cls, id=f"{family}-{cls}") for family, cls in SEAM]
EVERY += [pytest.param(family, None, id=family) for family in DENSE]


@pytest.mark.parametrize(("family", "experts_class"), EVERY)
def test_every_family_takes_what_strains_most_or_says_why_not(family: str, experts_class: str | None) -> None:
    model_type = family if experts_class is None else seam_model_type(family, experts_class)
    refused = {
        "moe_plus_plus": CANNOT_TAKE.get(family),
        "graph_of_tokens": CANNOT_TAKE.get(family) or CANNOT_AVERAGE.get(family),
    }
    for system, why in refused.items():
        if why is not None:
            with pytest.raises(UnsupportedFamilyError, match=why):
                fresh(model_type, system)
            continue
        model = fresh(model_type, system)
        _trains(model.train())
        if family not in OTHER_WITH_A_CACHE:
            _decodes(model.eval())
    if not any(refused.values()):
        _leaves_attention_alone(model_type)


def _trains(model: Any) -> None:
    inputs = tiny_inputs(model, ROWS, LENGTH)
    with use_context(model, context()):
        loss = output(model(**inputs)).float().square().mean()
        (loss + sum(balance_losses(model).values())).backward()
    for layer in moe_layers(model):
        for weight in (layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
            assert weight.grad is not None
            assert weight.grad.isfinite().all()
            assert weight.grad.abs().sum() > 0


def _decodes(model: Any) -> None:
    name, ids = next(iter(tiny_inputs(model, ROWS, LENGTH).items()))
    with torch.no_grad():
        whole = model(**{name: ids})
    if "past_key_values" in whole:  # an encoder has none
        torch.testing.assert_close(steps(model, ids, 5, name), output(whole)[:, 4:], rtol=1e-4, atol=1e-4)


def _leaves_attention_alone(model_type: str) -> None:
    """What the first layer's attention gives is the same to the bit whether a router averages by it or not."""
    given = []
    for system in ("moe_plus_plus", "graph_of_tokens"):
        model = fresh(model_type, system).eval()
        attention = model.get_decoder().layers[0].self_attn
        attention.register_forward_hook(lambda module, args, result: given.append(result[0]))
        with torch.no_grad():
            model(**tiny_inputs(model, ROWS, LENGTH))
    assert torch.equal(given[0], given[1])
