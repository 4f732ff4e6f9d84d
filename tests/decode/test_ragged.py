"""Many sequences in one row give what each gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from collegium.decode.kv import kv_cache
from collegium.decode.ragged import RaggedStep, unbatched_reason
from tiny import families, tiny_model

LENGTHS = (5, 12, 2, 9)


def start(model: Any, step: int = 0) -> tuple[list[torch.Tensor], list[Any]]:
    generator = torch.Generator().manual_seed(3)
    texts, caches = [], []
    for length in LENGTHS:
        texts.append(torch.randint(3, model.config.vocab_size, (1, length), generator=generator))
        caches.append(kv_cache(model.config))
        model(input_ids=texts[-1][:, :-1], past_key_values=caches[-1], use_cache=True)
    return texts, caches


BATCHED = families("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe", "olmoe", "jetmoe")


@pytest.mark.parametrize("family", BATCHED)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.inference_mode()
def test_logits_are_those_of_each_alone(family: str, attention: str) -> None:
    model = tiny_model(family, **({"sliding_window": 6} if family == "mixtral" else {}))
    if attention == "eager" or family != "gpt_oss":  # which has no other
        model.set_attn_implementation(attention)
    texts, caches = start(model)
    step = RaggedStep(model)
    for _ in range(10):
        logits = step([int(text[0, -1]) for text in texts], caches)
        for i, text in enumerate(texts):
            whole = model(input_ids=text, use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits[i], whole, rtol=1e-4, atol=1e-5)
            texts[i] = torch.cat([text, whole.argmax()[None, None]], 1)
    assert model.config._attn_implementation in (attention, "eager"), "the model is as it was"


class Fails(Exception):
    pass


@pytest.mark.parametrize("family", families("qwen3_moe", "gpt_oss", "deepseek_v3"))
@pytest.mark.parametrize("layer", [0, 1])
@torch.inference_mode()
def test_a_step_that_fails_leaves_no_trace(family: str, layer: int) -> None:
    model = tiny_model(family)
    (texts, caches), (_, clean) = start(model), start(model)
    step, tokens = RaggedStep(model), [int(text[0, -1]) for text in texts]

    def fail(*args: Any) -> None:
        raise Fails

    hook = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
    with pytest.raises(Fails):
        step(tokens, caches)
    hook.remove()
    assert [cache.get_seq_length() for cache in caches] == [length - 1 for length in LENGTHS]
    assert torch.equal(step(tokens, caches), RaggedStep(model)(tokens, clean))


@pytest.mark.parametrize("family", families("qwen3_next", "jamba", "nemotron_h", "lfm2_moe", "deepseek_v32", "zaya"))
def test_models_with_other_states_are_told_by_structure(family: str) -> None:
    model = tiny_model(family)
    assert type(model).__name__ in str(unbatched_reason(model))
    with pytest.raises(ValueError, match="one request at a time"):
        RaggedStep(model)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_scaled_by_the_longest_are_not_batched(kind: str) -> None:
    model = tiny_model("qwen3_moe")
    assert unbatched_reason(model) is None
    model.config.rope_parameters = {"full": {"rope_type": kind}}
    assert kind in str(unbatched_reason(model))
