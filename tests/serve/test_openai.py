"""The official client against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from serving import FakeEngine, chatting, demo, serving

PROMPT = "Once upon a time there was"


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with serving() as (address, _):
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


def greedy(prompt: str, count: int) -> str:
    """What transformers' own generate continues `prompt` with."""
    model, tokenizer = demo()
    ids = torch.tensor([[0, *tokenizer(prompt).input_ids]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return str(tokenizer.decode(output[0, ids.shape[1] :]))


def test_models(client: openai.OpenAI) -> None:
    (found,) = client.models.list().data
    assert found.id == "demo"
    about = client.models.retrieve("demo").model_extra["collegium"]
    assert about["context"] == 256
    assert about["chat"]
    assert about["experts"] == [{"layer": layer, "experts": 16} for layer in range(4)]


def test_completion_is_generate(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=20)
    assert answer.choices[0].text == greedy(PROMPT, 20)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    prompt = 1 + len(demo()[1](PROMPT).input_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 20)
    assert answer.usage.total_tokens == prompt + 20


def test_stream_is_the_same_text(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, stream=True, stream_options=options)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == greedy(PROMPT, 20)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_uses_the_template(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Once upon"}, {"type": "text", "text": " a time"}]},
    ]
    answer = client.chat.completions.create(model="demo", messages=messages, max_completion_tokens=12)
    model, tokenizer = demo()
    ids = torch.tensor([tokenizer("Be brief.\nOnce upon a time\n> ").input_ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert answer.choices[0].message.content == tokenizer.decode(output[0, ids.shape[1] :])
    assert answer.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(model="demo", messages=messages, max_tokens=12, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_echo_and_ids(client: openai.OpenAI) -> None:
    ids = demo()[1](PROMPT).input_ids
    wanted = client.completions.create(model="demo", prompt=ids, max_tokens=5).choices[0].text
    for prompt in (ids, [ids]):
        answer = client.completions.create(model="demo", prompt=prompt, max_tokens=5, echo=True)
        assert answer.choices[0].text == PROMPT + wanted
    stream = client.completions.create(model="demo", prompt=[PROMPT], max_tokens=5, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == PROMPT + greedy(PROMPT, 5)


def test_seed_and_temperature(client: openai.OpenAI) -> None:
    def draw(seed: int) -> str:
        answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=15, temperature=1.2, seed=seed)
        return answer.choices[0].text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_stop(client: openai.OpenAI) -> None:
    whole = greedy(PROMPT, 30)
    stop = whole[10:13]
    for stops in (stop, ["\u2603", stop]):
        answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=30, stop=stops)
        assert answer.choices[0].text == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
    stream = client.completions.create(model="demo", prompt=PROMPT, max_tokens=30, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole[: whole.index(stop)]


def test_logprobs(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(
        model="demo", messages=messages, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    assert "".join(one.token for one in content) == answer.choices[0].message.content
    for one in content:
        assert [one.token, one.logprob] == [one.top_logprobs[0].token, one.top_logprobs[0].logprob], "greedy"
        assert bytes(one.bytes).decode() == one.token
        assert len(one.top_logprobs) == 3
        assert 0 >= one.logprob >= one.top_logprobs[2].logprob
    plain = client.completions.create(model="demo", prompt=PROMPT, max_tokens=6, logprobs=2).choices[0]
    assert plain.logprobs.text_offset == [sum(map(len, plain.logprobs.tokens[:count])) for count in range(6)]
    assert "".join(plain.logprobs.tokens) == plain.text
    assert all(len(top) == 2 for top in plain.logprobs.top_logprobs)
    stream = client.completions.create(model="demo", prompt=PROMPT, max_tokens=6, logprobs=2, stream=True)
    offsets = [chunk.choices[0].logprobs.text_offset[0] for chunk in stream if chunk.choices[0].logprobs]
    assert offsets == plain.logprobs.text_offset


def test_a_request_traces_itself(client: openai.OpenAI) -> None:
    from collegium.sites import tap

    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=4, extra_body={"trace": True})
    traced = answer.model_extra["collegium"]["trace"]
    model, tokenizer = demo()
    seen: dict[int, Any] = {}

    def look(site: Any, x: Any, routing: Any) -> None:
        seen[site.layer] = routing.index_TK[-1], routing.weight_TK[-1]

    ids = [0, *tokenizer(PROMPT).input_ids]
    for token in traced:
        with tap(model, look), torch.inference_mode():
            model(torch.tensor([ids]))
        ids.append(token["token"])
        assert [entry["layer"] for entry in token["layers"]] == [0, 1, 2, 3]
        for entry in token["layers"]:
            experts, weights = seen[entry["layer"]]
            assert entry["experts"] == experts.tolist()
            assert entry["weights"] == pytest.approx(weights.tolist(), abs=1e-3)
            assert entry["source"] == ["memory", "memory"]
    assert tokenizer.decode(ids[-4:]) == answer.choices[0].text
    plain = client.completions.create(model="demo", prompt=PROMPT, max_tokens=4)
    assert "collegium" not in (plain.model_extra or {})


def test_an_engine_tells_where_experts_came_from() -> None:
    engine = FakeEngine()
    with serving(engine=engine) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        extra = {"trace": True}
        stream = client.completions.create(model="demo", prompt=[7, 8], max_tokens=3, stream=True, extra_body=extra)
        traces = [chunk.model_extra["collegium"]["trace"] for chunk in stream]
        assert len(traces) == 3
        # row 1 of the prompt, in layer 0: experts 3 and 4, whose codes are 0 and 1
        assert traces[0]["layers"][0] == {
            "layer": 0, "experts": [3, 4], "weights": [0.5, 0.5], "source": ["memory", "prefetch"],
        }  # fmt: skip
        assert traces[1]["layers"][2]["source"] == ["disk", "memory"]
        client.completions.create(model="demo", prompt=[7], max_tokens=2)
        assert engine.watchers == 0, "nobody watches when nobody asked"


def test_without_a_template() -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    with serving(demo()[1]) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        assert client.models.list().data[0].model_extra["collegium"]["chat"] is False
        with pytest.raises(openai.BadRequestError, match=r"/v1/completions.*--chat-template") as refused:
            client.chat.completions.create(model="demo", messages=messages)
        assert refused.value.code == "no_chat_template"
    with serving(demo()[1], chat_template=chatting().chat_template) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        assert client.chat.completions.create(model="demo", messages=messages, max_tokens=2).choices[0].message.content
