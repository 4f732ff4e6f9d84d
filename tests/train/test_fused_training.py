"""Norms and attention by kernels of our own: transformers' results within rounding, and its own code elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from collegium.train import Recipe, fused, read_metrics, train
from collegium.train.fused import fuse_around_experts
from tiny import tiny_model

FUSED = ["llama", "mistral", "mixtral", "qwen3", "qwen3_moe"]


def pair(family: str, seed: int = 0) -> tuple[Any, Any]:
    """A tiny model with unlike norm weights, and its fused copy."""
    torch.manual_seed(seed)
    model = tiny_model(family).train()
    if family in FUSED:
        model.config._attn_implementation = "sdpa"
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 1.0, 0.3)
    copied = copy.deepcopy(model)
    fuse_around_experts(copied)
    return model, copied


def results(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients by name."""
    model.zero_grad()
    torch.manual_seed(3)
    logits = model(**inputs, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(model: Any, other: Any, **inputs: Any) -> None:
    (logits, grads), (found, found_grads) = results(model, **inputs), results(other, **inputs)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    assert found_grads.keys() == grads.keys()
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for name, grad in grads.items():
        # a gradient that is zero but for rounding (queries with one key) has no scale of its own
        scale = max(float(grad.abs().max()), 1e-2 * largest)
        torch.testing.assert_close(found_grads[name], grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


def ids(B: int = 3, S: int = 11) -> Tensor:
    return torch.randint(3, 64, (B, S), generator=torch.Generator().manual_seed(1))


def replaced(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, fused._Norm | fused._Attention)]


@pytest.mark.parametrize("family", FUSED)
def test_logits_and_gradients_are_those_of_transformers(family: str) -> None:
    model, other = pair(family)
    attentions = [module for module in replaced(other) if isinstance(module, fused._Attention)]
    assert len(attentions) == model.config.num_hidden_layers
    assert any(isinstance(module, fused._Norm) for module in replaced(other))
    same(model, other, input_ids=ids())


def test_masks_and_positions_of_packed_documents() -> None:
    model, other = pair("qwen3")
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]).expand(3, -1)
    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2], [*range(11)], [*range(5, 16)]])
    mask = (document[:, :, None] == document[:, None, :]) & torch.ones(11, 11).tril().bool()
    same(model, other, input_ids=ids(), position_ids=position, attention_mask=mask[:, None])
    plain = other(input_ids=ids(), use_cache=False).logits
    masked = other(input_ids=ids(), position_ids=position, attention_mask=mask[:, None], use_cache=False).logits
    assert not torch.allclose(plain, masked), "masks and positions must matter here"


@pytest.mark.parametrize(("B", "S"), [(1, 1), (1, 2), (70, 3)], ids=str)
def test_fewer_and_more_rows_than_runs_of_them(B: int, S: int) -> None:
    same(*pair("qwen3"), input_ids=ids(B, S))


def test_gradients_may_lie_in_any_order() -> None:
    _, model = pair("qwen3")
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 7, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    places = model.model.rotary_emb(x, torch.arange(7)[None])
    found = []
    for order in ((0, 1, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0)):
        leaf = x.clone().requires_grad_()
        laid = [one.permute(order).contiguous() for one in fused._heads(attention, leaf, *places)]
        torch.stack([one.pow(3).sum() for one in laid]).sum().backward()
        found.append(leaf.grad)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_dropout_draws_the_same() -> None:
    torch.manual_seed(0)
    model = tiny_model("qwen3").train()
    model.config._attn_implementation = "sdpa"
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    other = copy.deepcopy(model)
    fuse_around_experts(other)
    assert isinstance(other.model.layers[0].self_attn, fused._Attention)
    assert other.model.layers[0].self_attn.training
    same(model, other, input_ids=ids())
    assert not torch.allclose(results(model, input_ids=ids())[0], results(model.eval(), input_ids=ids())[0])


def test_frozen_weights_get_no_gradient() -> None:
    model, other = pair("qwen3")
    for one in (model, other):
        for name, p in one.named_parameters():
            p.requires_grad_("q_proj" in name or "k_norm" in name or "embed" in name)
    same(model, other, input_ids=ids())


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    _, model = pair("qwen3")
    layer = model.model.layers[0]
    x = torch.randn(9, 40, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    places = model.model.rotary_emb(x, torch.arange(40)[None])
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        model.zero_grad()
        y = layer.input_layernorm(x)
        y.pow(2).sum().backward()
        heads = fused._heads(layer.self_attn, x, *places)
        sum(one.pow(2).sum() for one in heads[:2]).backward()
        norms = (layer.input_layernorm, layer.self_attn.q_norm, layer.self_attn.k_norm)
        found.append([y.detach(), *(norm.weight.grad.clone() for norm in norms)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_names_types_and_copies_stay() -> None:
    model, other = pair("qwen3")
    assert list(other.state_dict()) == list(model.state_dict())
    names = [[(type(m).__module__, type(m).__name__) for m in one.modules()] for one in (model, other)]
    assert names[0] == names[1]
    assert all(isinstance(b, type(a)) for a, b in zip(model.modules(), other.modules(), strict=True))
    assert fuse_around_experts(copy.deepcopy(other)) == 0, "once is enough"
    copied = copy.deepcopy(other)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    same(model, other, input_ids=ids())


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "gpt_oss", "deepseek_v3"])
def test_what_computes_something_else_stays(family: str) -> None:
    """Gemma adds 1 to the weight, OLMo norms all heads together, gpt-oss has sinks, DeepSeek-V3 latent attention."""
    model, other = pair(family)
    assert not any(isinstance(module, fused._Attention) for module in replaced(other))
    if family == "gemma2":
        assert not replaced(other)
    same(model, other, input_ids=ids())


@pytest.mark.parametrize("change", ["bias", "layer_norm", "sliding_window", "eager"])
def test_settings_that_the_kernels_do_not_know(change: str) -> None:
    torch.manual_seed(0)
    model = tiny_model("qwen3").train()
    attention = model.model.layers[1].self_attn
    if change == "bias":  # that begins as zeros and is trained
        attention.q_proj.bias = nn.Parameter(torch.zeros(attention.q_proj.out_features))
    elif change == "layer_norm":
        attention.q_norm, attention.k_norm = nn.LayerNorm(attention.head_dim), nn.LayerNorm(attention.head_dim)
    elif change == "sliding_window":
        attention.sliding_window = 4
    model.config._attn_implementation = "eager" if change == "eager" else "sdpa"
    other = copy.deepcopy(model)
    assert fuse_around_experts(other) > 0
    assert not isinstance(other.model.layers[1].self_attn, fused._Attention)
    assert isinstance(other.model.layers[0].self_attn, fused._Attention) == (change != "eager")
    same(model, other, input_ids=ids())


def test_the_original_runs_under_autocast_in_half_precision_and_with_a_cache() -> None:
    model, other = pair("qwen3")
    with torch.no_grad():
        caches = [DynamicCache(config=one.config) for one in (model, other)]
        for tokens in (ids(), ids(S=2)):  # the second time, what the cache holds counts
            both = zip((model, other), caches, strict=True)
            cached = [one(input_ids=tokens, past_key_values=cache).logits for one, cache in both]
            torch.testing.assert_close(cached[1], cached[0], rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = [one(input_ids=ids(), use_cache=False).logits for one in (model, other)]
        assert torch.equal(mixed[0], mixed[1])
        half = [one.bfloat16()(input_ids=ids(), use_cache=False).logits for one in (model, other)]
        assert torch.equal(half[0], half[1])


def test_a_second_derivative_is_refused() -> None:
    _, other = pair("qwen3")
    x = torch.randn(2, 5, other.config.hidden_size, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no second derivative .* set run\.fuse to false"):
        torch.autograd.grad(other.model.norm(x).sum(), x, create_graph=True)


def test_without_numba_everything_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "missing", ImportError("no numba"))
    _, other = pair("qwen3")
    assert replaced(other) == []


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "activations computed anew"])
def test_gradient_checkpointing(checkpointing: bool) -> None:
    model, other = pair("qwen3")
    if checkpointing:
        other.gradient_checkpointing_enable({"use_reentrant": False})
    same(model, other, input_ids=ids())


@pytest.mark.parametrize("router", [None, "graph_of_tokens"], ids=["plain", "one that averages by attention"])
def test_a_run_changes_by_rounding_only(recipe: Callable[..., Recipe], router: str | None, tmp_path: Path) -> None:
    curves = []
    for fuse in (False, True):
        plan = recipe(run__fuse=fuse, run__steps=8, run__eval_every=4, moe__router=router)
        train(plan, tmp_path / str(fuse))
        curves.append(read_metrics(tmp_path / str(fuse) / "metrics.jsonl")["loss"])
    assert curves[0].to_list() == pytest.approx(curves[1].to_list(), rel=1e-3)
    assert curves[0].to_list() != curves[1].to_list(), "the kernels ran"
