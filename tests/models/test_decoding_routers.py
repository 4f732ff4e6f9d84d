"""Routers that look at other tokens, in transformers models: with a cache as without, causal, and with documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from collegium import models
from collegium.errors import ConfigError
from collegium.layer import moe_layers, use_context
from collegium.models import MoEConfig, install
from collegium.routing import RoutingContext
from tiny import tiny_inputs, tiny_model

PLAIN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ATTENTION = {"graph_of_tokens": {"by": "attention", "share": 0.5}}
SIMILARITY = {"graph_of_tokens": {"by": "similarity", "share": 0.5}}


def installed(router: Any, family: str = "qwen3", attention: str = "sdpa") -> Any:
    model = tiny_model(family)
    model.config._attn_implementation = attention
    install(model, MoEConfig.model_validate({**PLAIN, "router": router}))
    torch.manual_seed(0)
    for layer in moe_layers(model):
        torch.nn.init.normal_(layer.gate.weight, std=0.5)
    return model.eval()


@torch.no_grad()
def steps(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Logits after a prompt and after each further token, with a cache."""
    found = model(input_ids=ids[:, :prompt], use_cache=True)
    logits = [found.logits[:, -1]]
    for at in range(prompt, ids.shape[1]):
        found = model(input_ids=ids[:, at : at + 1], past_key_values=found.past_key_values, use_cache=True)
        logits.append(found.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("router", [ATTENTION, SIMILARITY], ids=["attention", "similarity"])
def test_with_a_cache_as_without(router: Any, family: str, attention: str) -> None:
    model = installed(router, family, attention)
    ids = tiny_inputs(model, batch=2, length=12)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    for prompt in (1, 5, 11):
        torch.testing.assert_close(steps(model, ids, prompt), whole[:, prompt - 1 :], rtol=1e-4, atol=1e-5)
    # another sequence in between has another cache
    one, other = (model(input_ids=part, use_cache=True) for part in (ids[:, :6], ids.flip(1)[:, :4]))
    with torch.no_grad():
        more = model(input_ids=ids[:, 6:7], past_key_values=one.past_key_values).logits
        model(input_ids=ids[:, 6:7], past_key_values=other.past_key_values)
    torch.testing.assert_close(more[:, 0], whole[:, 6], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", [ATTENTION, SIMILARITY], ids=["attention", "similarity"])
def test_beams_take_along_what_routers_keep(router: Any) -> None:
    model = installed(router)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)  # beams that are close to one another change places
    ids = tiny_inputs(model, batch=2, length=6)["input_ids"]
    asked = {"num_beams": 4, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, afresh = (model.generate(ids, use_cache=use, **asked) for use in (True, False))
    assert torch.equal(cached, afresh)


@pytest.mark.parametrize("router", [ATTENTION, SIMILARITY], ids=["attention", "similarity"])
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_sequences_of_a_cache_may_change_places(router: Any, how: str) -> None:
    model = installed(router)
    ids = tiny_inputs(model, batch=3, length=8)["input_ids"]
    places = torch.tensor([2, 0, 0]) if how != "batch_repeat_interleave" else torch.arange(3).repeat_interleave(2)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :7], use_cache=True).past_key_values
        getattr(cache, how)(2 if how == "batch_repeat_interleave" else places)
        found = model(input_ids=ids[places, 7:], past_key_values=cache).logits[:, 0]
        whole = model(input_ids=ids[places], use_cache=False).logits[:, 7]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", [ATTENTION, SIMILARITY], ids=["attention", "similarity"])
def test_it_averages_and_is_causal(router: Any) -> None:
    model, plain = installed(router), installed({"weigh": {"normalise": True}})
    ids = tiny_inputs(model, batch=1, length=10)["input_ids"]
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 60
    with torch.no_grad():
        one, other, without = (m(input_ids=i).logits for m, i in ((model, ids), (model, changed), (plain, ids)))
    assert torch.equal(one[:, :7], other[:, :7])
    assert not torch.allclose(one[:, 1:], without[:, 1:])
    torch.testing.assert_close(one[:, 0], without[:, 0])  # the first token has nobody to look at


def test_gradients_flow_through_the_average_and_through_checkpointing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = installed(ATTENTION).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = tiny_inputs(model, batch=2, length=8)["input_ids"]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append([layer.gate.weight.grad.clone() for layer in moe_layers(model)])
    for one, other in zip(*grads, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other)


def test_a_cache_from_elsewhere_is_refused() -> None:
    model = installed(SIMILARITY)
    ids = tiny_inputs(model, batch=1, length=6)["input_ids"]
    with torch.no_grad():
        cache = tiny_model("qwen3")(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="begin with an empty one"):
            model(input_ids=ids[:, :1], past_key_values=cache)


def test_attention_that_cannot_give_it_is_refused_and_leaves_the_model_alone() -> None:
    model = tiny_model("qwen3")
    model.config._attn_implementation_internal = "flex_attention"
    before = model.model.layers[0].mlp
    with pytest.raises(ConfigError, match="attn_implementation='sdpa'"):
        install(model, MoEConfig.model_validate({**PLAIN, "router": ATTENTION}))
    assert model.model.layers[0].mlp is before


def test_experts_that_choose_cannot_decode() -> None:
    model = installed("expert_choice")
    ids = tiny_inputs(model, batch=1, length=6)["input_ids"]
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids, use_cache=False).logits).all()
        with pytest.raises(ConfigError, match="ExpertChoice lets a token's routing depend on later tokens"):
            model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


EMO = {"emo": {"smallest": 2, "largest": 4}}


def test_pools_in_training_hold_the_tokens_of_a_document() -> None:
    model = installed(EMO).train()
    ids = tiny_inputs(model, batch=2, length=16)["input_ids"]
    document = torch.tensor([0] * 10 + [1] * 6 + [2] * 16)
    with pytest.raises(ConfigError, match="document"):
        model(input_ids=ids)
    seen = []
    for step in range(4):
        with use_context(model, RoutingContext(document=document, step=step)):
            model(input_ids=ids, use_cache=False)
        for layer in moe_layers(model):
            assert layer.last is not None
            pools = [layer.last.index_TK[document == one].unique() for one in range(3)]
            assert all(2 <= len(pool) <= 4 for pool in pools)
            seen.append([pool.tolist() for pool in pools])
            assert torch.isfinite(layer.last.weight).all()
    assert len({str(one) for one in seen}) > 4


def test_a_pool_of_the_prompt_stays() -> None:
    model = installed({"emo": {"smallest": 2, "eval_size": 3}})
    ids = tiny_inputs(model, batch=2, length=16)["input_ids"]
    chosen: list[set[int]] = [set(), set()]
    layer = moe_layers(model)[-1]

    def see(module: Any, args: Any, routing: Any) -> None:
        for at, row in enumerate(routing.index_TK.tolist()):
            chosen[at // (routing.num_tokens // 2)].update(row)

    layer.gate.register_forward_hook(see)
    steps(model, ids, 8)
    assert all(len(one) <= 3 for one in chosen)


@pytest.mark.parametrize("router", [ATTENTION, SIMILARITY, EMO, "moe_plus_plus"], ids=str)
def test_saved_and_loaded(router: Any, tmp_path: Path) -> None:
    model = installed(router)
    ids = tiny_inputs(model, batch=1, length=9)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        models.save(model, tmp_path / "model")
        again = models.load(tmp_path / "model")
        assert torch.equal(again(input_ids=ids).logits, whole)
