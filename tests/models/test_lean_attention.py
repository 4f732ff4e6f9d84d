"""Attention of one token equals torch's, in every grouping of heads; what it does not know goes to ``sdpa``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from collegium.models import attention
from collegium.models.attention import NAME, use_lean_attention
from tiny import tiny_inputs, tiny_model

MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=1)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("width", [16, 24])
def test_one_token_is_that_of_float32(groups: int, width: int) -> None:
    torch.manual_seed(groups)
    query = torch.randn(2, 6, 1, 16).bfloat16()
    key, value = torch.randn(2, groups, 37, 16).bfloat16(), torch.randn(2, groups, 37, width).bfloat16()
    found, _ = attention._attention(MODULE, query, key, value, None, scaling=0.3)  # type: ignore[arg-type]
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    assert found.shape == (2, 1, 6, width)
    torch.testing.assert_close(found.float(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("tokens", "dtype", "extra"),
    [(3, torch.bfloat16, {}), (1, torch.float32, {}), (1, torch.bfloat16, {"attention_mask": torch.zeros(1, 1, 1, 9)})],
)
def test_the_rest_is_left_to_torch_bit_for_bit(tokens: int, dtype: torch.dtype, extra: dict[str, torch.Tensor]) -> None:
    query = torch.randn(1, 4, tokens, 8).to(dtype)
    key, value = torch.randn(2, 1, 4, 9, 8).to(dtype)
    mask = extra.get("attention_mask")
    mask = None if mask is None else mask.to(dtype)
    found, _ = attention._attention(MODULE, query, key, value, mask)  # type: ignore[arg-type]
    expected, _ = sdpa_attention_forward(MODULE, query, key, value, mask)  # type: ignore[arg-type]
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
