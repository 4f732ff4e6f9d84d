"""The next token against transformers' generate, and the penalties by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding import demo

from collegium.decode import Batcher, Request
from collegium.decode.sampling import Sampler, Sampling, end_tokens
from collegium.errors import NonFiniteError

PROMPT = tuple(range(20, 30))


def sampler(**settings: Any) -> Sampler:
    request = Request(PROMPT, **settings)
    return Sampler(Sampling.of(SimpleNamespace(), request), request)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_is_generate(penalty: float) -> None:
    model, tokenizer = demo()
    wanted = model.generate(
        torch.tensor([PROMPT]), do_sample=False, repetition_penalty=penalty, max_new_tokens=40, attention_mask=None
    )[0, len(PROMPT) :].tolist()
    batcher = Batcher(model, tokenizer, context=256)
    stream = batcher.submit(Request(PROMPT, max_tokens=40, repetition_penalty=penalty))
    assert [event.token for event in stream] == wanted
    assert batcher.close()


def test_defaults_are_those_of_the_model() -> None:
    config = SimpleNamespace(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=None)
    assert Sampling.of(config, Request((1,))) == Sampling(0.6, 0.9, 20, 1.0)
    assert Sampling.of(config, Request((1,), temperature=0, top_k=0)) == Sampling(0, 0.9, 0, 1.0)
    config.do_sample = False
    assert Sampling.of(config, Request((1,))).temperature == 0, "a model that does not sample is greedy"


def test_penalties_count_what_was_generated() -> None:
    logits = torch.tensor([5.0, 4.55, 0.0])
    draw = sampler(presence_penalty=0.5, frequency_penalty=0.1, temperature=0.0)
    # token 0 falls to 4.4, 4.3, 4.2, 4.1, 4.0, 3.9; token 1 to 3.95
    assert [draw(logits)[0] for _ in range(8)] == [0, 1, 0, 0, 0, 0, 0, 1]


def test_top_k_and_top_p_leave_the_rest_out() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
    draw = sampler(temperature=2.0, top_k=2, seed=1)
    assert {draw(logits)[0] for _ in range(200)} == {0, 1}
    draw = sampler(temperature=1.0, top_p=0.6, seed=1)
    assert {draw(logits)[0] for _ in range(200)} == {0}


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits, one, two = torch.tensor([1.0, 0.0, 2.0]), sampler(temperature=1.0, seed=5), sampler(temperature=1.0, seed=5)
    drawn = [one(logits)[0] for _ in range(3000)]
    assert drawn == [two(logits)[0] for _ in range(3000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=3) / 3000
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.04, rtol=0)


def test_logprobs_are_of_the_model_not_of_the_settings() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0])
    token, found = sampler(temperature=0.1, presence_penalty=1, logprobs=2, seed=1)(logits)
    assert found is not None
    exact = logits.log_softmax(0)
    assert found.logprob == pytest.approx(float(exact[token]))
    assert [index for index, _ in found.top] == [2, 0]
    assert sampler(temperature=0.0)(logits)[1] is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_logits_are_named(bad: float) -> None:
    with pytest.raises(NonFiniteError):
        sampler()(torch.tensor([0.0, bad]))


@pytest.mark.parametrize(("ids", "ends"), [(3, {3}), ([3, 4], {3, 4}), (None, {9})])
def test_end_tokens(ids: Any, ends: set[int]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ids))
    assert end_tokens(model, SimpleNamespace(eos_token_id=9)) == ends
