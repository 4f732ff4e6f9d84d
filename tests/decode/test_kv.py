"""The cache layer against transformers' own, and its undo."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from collegium.decode import kv
from collegium.decode.kv import KVLayer, kv_cache
from tiny import families, tiny_model


@given(st.sampled_from([None, 2, 5, 300]), st.lists(st.integers(1, 40), min_size=1, max_size=40), st.data())
def test_layer_holds_what_transformers_own_holds(window: int | None, sizes: list[int], data: st.DataObject) -> None:
    layer, generator = KVLayer(window), torch.Generator().manual_seed(len(sizes))
    own = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv, "BLOCK", 16)
        for size in sizes:
            if data.draw(st.booleans()):  # an append that is taken back leaves no trace
                before = layer.get_seq_length(), layer.get_mask_sizes(3)
                layer.update(torch.full((1, 2, size, 3), 7.0), torch.full((1, 2, size, 4), 7.0))
                layer.crop(-size)
                assert (layer.get_seq_length(), layer.get_mask_sizes(3)) == before
            keys, values = (torch.randn(1, 2, size, width, generator=generator) for width in (3, 4))
            assert layer.get_mask_sizes(size) == own.get_mask_sizes(size)
            for ours, theirs in zip(layer.update(keys, values), own.update(keys, values), strict=True):
                assert torch.equal(ours, theirs)
            assert layer.get_seq_length() == own.get_seq_length()


def test_a_window_bounds_the_memory() -> None:
    layer = KVLayer(20)
    for _ in range(5000):
        layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    assert layer._buffers is not None
    assert layer._buffers[0].shape[-2] <= 2 * kv.BLOCK


def test_no_more_than_the_last_append_comes_back() -> None:
    layer = KVLayer(4)
    layer.update(torch.zeros(1, 1, 9, 1), torch.zeros(1, 1, 9, 1))
    layer.update(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1))
    with pytest.raises(ValueError, match="the last update appended 2"):
        layer.crop(-3)
    layer.crop(-2)
    with pytest.raises(ValueError, match="appended 0"):
        layer.crop(-1)


@pytest.mark.parametrize("family", families("qwen3_moe", "gpt_oss", "granitemoehybrid"))
def test_which_models_have_plain_caches(family: str) -> None:
    cache = kv_cache(tiny_model(family).config)
    assert (cache is None) == (family == "granitemoehybrid")
