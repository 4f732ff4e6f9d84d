"""What a server refuses, and how: always in OpenAI's form, never with a traceback, never with a status of 422."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import demo, eventually, serving

from collegium.decode import batcher as batcher_module
from collegium.errors import CheckpointError

TEXT = {"model": "demo", "prompt": "Once", "max_tokens": 2}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with serving(context=64, max_body=50_000) as (address, _), httpx.Client(base_url=address) as client:
        yield client


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    (key, error), *rest = response.json().items()
    assert (key, rest) == ("error", [])
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return dict(error)


BAD_TEXT: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1000}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 99}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"seed": 2**80}, "seed"),
    ({"logprobs": 21}, "logprobs"),
    ({"stop": [""]}, "stop"),
    ({"stop": 7}, "stop"),
    ({"stop": ["x"] * 40}, "stop"),
    ({"n": 2}, "n"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"temprature": 1}, "temprature"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": [1, 10**30], "echo": True}, "prompt"),
    ({"prompt": [5000], "echo": True}, "prompt"),
    ({"prompt": ["one", "two"]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"model": 3}, "model"),
    ({"stream": "yes"}, "stream"),
]


@pytest.mark.parametrize(("change", "param"), BAD_TEXT, ids=lambda value: str(value)[:40])
def test_bad_fields_of_completions(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    error = refused(http.post("/v1/completions", json={**TEXT, **change}), 400)
    assert error["param"] == param
    assert param in error["message"]
    assert len(error["message"]) < 400
    assert error["type"] == "invalid_request_error"


BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "refuse"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 200}]}, "messages"),
    ({"max_completion_tokens": -5}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 50}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
]


@pytest.mark.parametrize(("change", "param"), BAD_CHAT, ids=lambda value: str(value)[:40])
def test_bad_fields_of_chats(http: httpx.Client, change: dict[str, Any], param: str) -> None:
    assert refused(http.post("/v1/chat/completions", json={**CHAT, **change}), 400)["param"] == param


BAD_BODIES = [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 40_000, b'{"model": ' + b"9" * 9000 + b"}",
    b'{"model":"demo","prompt":"x","temperature":NaN}', b'{"model":"demo","prompt":"x","temperature":Infinity}',
    b'{"model":"demo","prompt":"x","temperature":1e999}', b'{"model":"demo","prompt":"\\ud800"}',
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:30]))
def test_malformed_bodies(http: httpx.Client, body: bytes) -> None:
    refused(http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}), 400)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*TEXT, *CHAT, "temperature", "stop", "seed", "logprobs", "stream", "trace", "n", "echo"])


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)]), FIELDS, JSON)
def test_any_value_is_answered_in_form(http: httpx.Client, where: Any, field: str, value: Any) -> None:
    path, body = where
    # as Python writes it, with NaN and lone surrogates
    content = json.dumps({**body, field: value})
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        refused(response, response.status_code)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "demo/", "demo/../demo", "DEMO", "", "C:\\x", "x" * 5000, "%2e%2e"]
)
def test_names_are_only_compared(http: httpx.Client, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the disk was touched")

    for function in ("open", "stat", "scandir", "listdir"):
        monkeypatch.setattr(f"os.{function}", touched)
    error = refused(http.post("/v1/completions", json={**TEXT, "model": name}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_names_in_the_path(http: httpx.Client) -> None:
    refused(http.get("/v1/models/..%2f..%2fetc%2fpasswd"), 404)
    assert http.get("/v1/models/demo").json()["id"] == "demo"


def test_paths_methods_and_types(http: httpx.Client) -> None:
    refused(http.get("/v1/nothing"), 404)
    refused(http.get("/v1/completions"), 405)
    refused(http.get("/docs"), 404)
    # what any web page may send to a server of this machine without asking
    plain = {"Content-Type": "text/plain"}
    refused(http.post("/v1/completions", content=json.dumps(TEXT), headers=plain), 415)


def test_bodies_and_prompts_have_a_limit(http: httpx.Client) -> None:
    refused(http.post("/v1/completions", json={**TEXT, "prompt": "x" * 60_000}), 413)

    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    refused(http.post("/v1/completions", content=parts(), headers={"Content-Type": "application/json"}), 413)
    error = refused(http.post("/v1/completions", json={**TEXT, "prompt": "word " * 5000}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "context of 64" in error["message"]


def test_the_key() -> None:
    with serving(api_key="sécret") as (address, _), httpx.Client(base_url=address) as http:
        for path in ("/v1/models", "/v1/models/demo", "/metrics"):
            refused(http.get(path), 401)
        for value in ("", "Bearer", "Bearer wrong", "Basic s\xe9cret", "Bearer " + "x" * 5000):
            header = {"Authorization": value.encode("latin-1")}
            assert refused(http.post("/v1/completions", json=TEXT, headers=header), 401)["code"] == "invalid_api_key"
        good = {"Authorization": "Bearer sécret".encode()}
        assert http.post("/v1/completions", json=TEXT, headers=good).status_code == 200
        assert http.get("/health").status_code == http.get("/").status_code == 200


def test_other_hosts() -> None:
    with serving(allowed_hosts=["127.0.0.1"]) as (address, _), httpx.Client(base_url=address) as http:
        assert http.get("/v1/models").status_code == 200
        assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 400


class Hold:
    """Holds the demo model in front of its next forward, or fails it."""

    def __init__(self) -> None:
        self.open, self.error = threading.Event(), None
        self.handle = demo()[0].register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        assert self.open.wait(20)
        if self.error:
            error, self.error = self.error, None
            raise error

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()
        self.open.set()


def test_past_the_queue() -> None:
    with serving(max_batch=1, queue=1) as (address, batcher), Hold() as hold:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        answers: list[Any] = []

        def ask() -> None:
            answers.append(client.completions.create(model="demo", prompt=[5], max_tokens=2))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        eventually(lambda: (batcher.running, batcher.waiting) == (1, 1))
        with pytest.raises(openai.RateLimitError) as full:
            ask()
        assert full.value.response.headers["Retry-After"] == "1"
        health = httpx.get(f"{address}/health").json()
        assert health == {"status": "ok", "running": 1, "waiting": 1}
        hold.open.set()
        for thread in threads:
            thread.join(10)
        assert len(answers) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails_once(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher_module._log, "disabled", True)
    with serving() as (address, _), Hold() as hold:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        hold.open.set()
        hold.error = CheckpointError("layer 1, expert 3: its checksum is wrong")
        with pytest.raises(openai.InternalServerError, match="expert 3"):
            client.completions.create(model="demo", prompt=[5], max_tokens=2, stream=stream)
        hold.error = RuntimeError("/secret/path")
        with pytest.raises(openai.InternalServerError, match="RuntimeError") as failed:
            client.completions.create(model="demo", prompt=[5], max_tokens=2, stream=stream)
        assert "/secret/path" not in str(failed.value)
        assert client.completions.create(model="demo", prompt=[5], max_tokens=2).usage.completion_tokens == 2


def test_a_model_that_fails_in_the_middle_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher_module._log, "disabled", True)
    with serving() as (address, _), Hold() as hold:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        hold.open.set()
        stream = client.completions.create(model="demo", prompt=[5], max_tokens=200, stream=True)
        next(iter(stream))
        hold.error = CheckpointError("layer 1, expert 3: its checksum is wrong")
        with pytest.raises(openai.APIError, match="expert 3"):
            list(stream)
        assert client.completions.create(model="demo", prompt=[5], max_tokens=2).usage.completion_tokens == 2
        metrics = httpx.get(f"{address}/metrics").text
        assert 'collegium_requests_total{status="500"} 1.0' in metrics
        assert 'collegium_requests_total{status="200"} 1.0' in metrics


def test_requests_that_a_dense_model_cannot_trace() -> None:
    from serving import chatting, running

    from collegium.assets import SHIPPED
    from collegium.decode import Batcher
    from collegium.models import load
    from collegium.serve import build_app

    batcher = Batcher(load(SHIPPED["demo-dense"]), chatting(), context=64)
    with running(build_app(batcher, model_name="dense")) as address:
        asked = {**TEXT, "model": "dense"}
        error = refused(httpx.post(f"{address}/v1/completions", json={**asked, "trace": True}), 400)
        assert error["param"] == "trace"
        assert httpx.post(f"{address}/v1/completions", json=asked).status_code == 200
        about = httpx.get(f"{address}/v1/models").json()["data"][0]["collegium"]
        assert (about["traces"], about["experts"]) == (False, [])
    assert batcher.close()
