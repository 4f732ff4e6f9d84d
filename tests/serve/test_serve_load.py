"""Clients that come and go, metrics, and stopping."""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import FakeEngine, demo, eventually, serving

from collegium.decode.batcher import Batcher

SERVER = """
import sys, torch, collegium
sys.path.insert(0, {tests!r})
from serving import chatting, demo
from collegium.decode import Batcher
from collegium.serve import build_app, serve
torch.set_num_threads(1)
batcher = Batcher(demo()[0], chatting(), context=256)
import time
demo()[0].register_forward_pre_hook(lambda *_: time.sleep(0.01))
serve(build_app(batcher, model_name="demo"), port=0, drain_seconds={drain}, ready=lambda url: print(url, flush=True))
print("ended", batcher.alive, flush=True)
"""


async def come_and_go(address: str, batcher: Batcher, clients: int, seconds: float) -> dict[str, int]:
    """`clients` at once, each asking again and again, and leaving in the middle at random; what became of them."""
    until, chance = time.monotonic() + seconds, random.Random(0)
    counts = {"answered": 0, "left": 0, "full": 0}
    limits = httpx.Limits(max_connections=None)

    async def one(http: httpx.AsyncClient) -> None:
        while time.monotonic() < until:
            stream, patience = chance.random() < 0.7, chance.choice([0.01, 0.1, 0.5, 60])
            body = {"model": "demo", "prompt": [chance.randrange(9, 999)] * chance.randint(1, 30), "stream": stream}
            body["max_tokens"] = chance.randint(1, 40)
            try:
                async with asyncio.timeout(patience):
                    response = await http.post("/v1/completions", json=body)
                assert response.status_code in (200, 429), response.text
                counts["answered" if response.status_code == 200 else "full"] += 1
                if response.status_code == 429:
                    await asyncio.sleep(chance.random() * 0.2)
            except TimeoutError:
                counts["left"] += 1

    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=120) as http:
        await asyncio.gather(*[one(http) for _ in range(clients)])
    return counts


def go(seconds: float) -> None:
    with serving(max_batch=8, queue=40, prefill_chunk=16) as (address, batcher):
        httpx.post(f"{address}/v1/completions", json={"model": "demo", "prompt": [5], "max_tokens": 2})
        threads = threading.active_count()
        counts = asyncio.run(come_and_go(address, batcher, 200, seconds))
        eventually(lambda: batcher.running == batcher.waiting == 0)
        assert min(counts.values()) > 0, counts
        gc.collect()
        # the event loop keeps a pool of up to 40 threads for encoding prompts
        assert threading.active_count() <= threads + 40
        answer = httpx.post(f"{address}/v1/completions", json={"model": "demo", "prompt": [5], "max_tokens": 2})
        assert answer.json()["usage"]["completion_tokens"] == 2
        # nothing of a request that ended is held
        eventually(lambda: not any(type(one).__name__ == "_Run" for one in gc.get_objects()))


def test_200_clients_come_and_go() -> None:
    go(2)


@pytest.mark.slow
def test_200_clients_come_and_go_for_two_minutes() -> None:
    import resource

    go(20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    go(120)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before * 1.2, "memory grows with time"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(stream: bool) -> None:
    slow = demo()[0].register_forward_pre_hook(lambda *_: time.sleep(0.02))
    try:
        with serving(max_batch=1) as (address, batcher):
            body = {"model": "demo", "prompt": [5], "max_tokens": 200, "stream": stream}
            with httpx.Client(base_url=address) as http:
                if stream:
                    with http.stream("POST", "/v1/completions", json=body) as response:
                        next(response.iter_lines())
                        assert batcher.running == 1
                else:
                    with pytest.raises(httpx.ReadTimeout):
                        http.post("/v1/completions", json=body, timeout=0.3)
            left = time.monotonic()
            eventually(lambda: batcher.running == 0)
            assert time.monotonic() - left < 1.5, "200 tokens would take 4 s"
            eventually(lambda: 'status="499"} 1.0' in httpx.get(f"{address}/metrics").text)
    finally:
        slow.remove()


def test_metrics() -> None:
    with serving(engine=FakeEngine()) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        for stream in (False, True):
            answer: Any = client.completions.create(model="demo", prompt=[5, 6], max_tokens=3, stream=stream)
            if stream:
                list(answer)
        httpx.post(f"{address}/v1/completions", json={"model": "other", "prompt": "x"})
        lines = dict(
            line.rsplit(" ", 1) for line in httpx.get(f"{address}/metrics").text.splitlines() if line[0] != "#"
        )
        assert lines['collegium_requests_total{status="200"}'] == "2.0"
        assert lines['collegium_requests_total{status="404"}'] == "1.0"
        assert lines['collegium_tokens_total{kind="prompt"}'] == "4.0"
        assert lines['collegium_tokens_total{kind="generated"}'] == "6.0"
        assert lines["collegium_first_token_seconds_count"] == "2.0"
        assert lines["collegium_requests_running"] == lines["collegium_requests_waiting"] == "0.0"
        assert lines["collegium_engine_hits_total"] == "30.0"
        assert lines["collegium_engine_stall_seconds_total"] == "0.5"


def test_health_while_draining() -> None:
    slow = demo()[0].register_forward_pre_hook(lambda *_: time.sleep(0.02))
    try:
        with serving() as (address, batcher):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
            stream = client.completions.create(model="demo", prompt=[5], max_tokens=40, stream=True)
            next(iter(stream))
            threading.Thread(target=batcher.close).start()
            eventually(lambda: batcher.closing)
            health = httpx.get(f"{address}/health")
            assert (health.status_code, health.json()["status"]) == (503, "draining")
            with pytest.raises(openai.InternalServerError) as refused:
                client.completions.create(model="demo", prompt=[5])
            assert refused.value.status_code == 503
            assert list(stream)[-1].choices[0].finish_reason == "length"
            eventually(lambda: not batcher.alive)
            assert httpx.get(f"{address}/health").json()["status"] == "stopped"
    finally:
        slow.remove()


@pytest.mark.parametrize(
    # a process of its own takes seconds to start, so the second is left to the long tests
    ("name", "drain"),
    [("SIGTERM", 30), pytest.param("SIGINT", 0.3, marks=pytest.mark.slow)],
)
def test_a_signal_finishes_what_runs(name: str, drain: float) -> None:
    code = SERVER.format(tests=str(Path(__file__).parent), drain=drain)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        stream = client.completions.create(model="demo", prompt=[5], max_tokens=100, stream=True)
        next(iter(stream))
        process.send_signal(getattr(signal, name))
        if drain > 1:
            assert list(stream)[-1].choices[0].finish_reason == "length", "it was cut off"
        else:
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
        assert process.wait(20) == 0
        assert process.stdout.read() == "ended False\n"
