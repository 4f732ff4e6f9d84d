"""Attention of one token equals torch's, in every grouping of heads; what it does not know goes to ``sdpa``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from collegium.experts.compute.jit import LANES, missing
from collegium.models import attention
from collegium.models.attention import NAME, use_lean_attention
from tiny import tiny_inputs, tiny_model

MODULE: Any = SimpleNamespace(is_causal=True, num_key_value_groups=1)


def _module(groups: int, heads: int = 2) -> Any:
    return SimpleNamespace(is_causal=True, num_key_value_groups=heads // groups)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("keys", [8, 37, 300])
def test_one_token_is_that_of_float32(groups: int, width: int, keys: int) -> None:
    torch.manual_seed(groups)
    query = torch.randn(1, 6, 1, 16).bfloat16()
    # as a cache hands them out: views into something longer
    key = torch.randn(1, groups, keys + 9, 16).bfloat16()[:, :, 3 : 3 + keys]
    value = torch.randn(1, groups, keys + 4, width).bfloat16()[:, :, :keys]
    assert attention.fits(query, key, value) is (missing is None and LANES > 4)
    found, _ = attention._attention(_module(groups, 6), query, key, value, None, scaling=0.3)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    assert found.shape == (1, 1, 6, width)
    torch.testing.assert_close(found.float(), exact, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_scores_of_any_size_give_shares(scale: float) -> None:
    query, key = 5 * torch.randn(2, 1, 2, 24, 16).bfloat16()
    found, _ = attention._attention(_module(2), query[:, :, :1], key, torch.ones_like(key), None, scaling=scale)
    torch.testing.assert_close(found, torch.ones_like(found))  # the shares of a row add up to 1


def test_what_is_not_finite_stays_in_its_head() -> None:
    query, key = torch.randn(2, 1, 2, 24, 16).bfloat16()
    key[0, 1, 5, 3] = float("nan")
    found, _ = attention._attention(_module(2), query[:, :, :1], key, key, None)
    assert found[0, 0, 0].isfinite().all()
    assert found[0, 0, 1].isnan().any()


@pytest.mark.parametrize(
    ("sequences", "keys", "width"), [(2, 37, 16), (1, 7, 16), (1, 37, 24)], ids=["batch", "few keys", "odd width"]
)
def test_what_the_kernel_does_not_take_goes_to_torch(sequences: int, keys: int, width: int) -> None:
    query, key = torch.randn(sequences, 2, 1, 16).bfloat16(), torch.randn(sequences, 2, keys, 16).bfloat16()
    value = torch.randn(sequences, 2, keys, width).bfloat16()
    found, _ = attention._attention(_module(2), query, key, value, None)
    expected, _ = sdpa_attention_forward(_module(2), query, key, value, None)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("tokens", "dtype", "extra"),
    [(3, torch.bfloat16, {}), (1, torch.float32, {}), (1, torch.bfloat16, {"attention_mask": torch.zeros(1, 1, 1, 9)})],
)
def test_the_rest_is_left_to_torch_bit_for_bit(tokens: int, dtype: torch.dtype, extra: dict[str, torch.Tensor]) -> None:
    query = torch.randn(1, 4, tokens, 8).to(dtype)
    key, value = torch.randn(2, 1, 4, 9, 8).to(dtype)
    mask = extra.get("attention_mask")
    mask = None if mask is None else mask.to(dtype)
    found, _ = attention._attention(MODULE, query, key, value, mask)
    expected, _ = sdpa_attention_forward(MODULE, query, key, value, mask)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
@torch.inference_mode()
def test_a_model_writes_on_as_before(family: str) -> None:
    model = tiny_model(family).bfloat16()
    ids = tiny_inputs(model, batch=1, length=12)["input_ids"]

    def step() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :-1], past_key_values=cache)
        return model(input_ids=ids[:, -1:], past_key_values=cache).logits.float()

    before = step()
    use_lean_attention(model)
    assert model.config._attn_implementation == NAME
    assert torch.nn.functional.cosine_similarity(step(), before, -1).min() > 0.995
