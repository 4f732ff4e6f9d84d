"""Requests that join and leave at random get what each gets alone; failures stay with whom they belong to."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from decoding import Bytes, alone, demo

from collegium.decode import Batcher, BatcherClosedError, Event, FieldError, Observer, QueueFullError, Request, Stream
from collegium.decode.batcher import _log
from collegium.errors import CheckpointError, ConfigError
from tiny import families, tiny_model


@contextmanager
def batching(model: Any, tokenizer: Any = None, **settings: Any) -> Iterator[Batcher]:
    batcher = Batcher(model, tokenizer or Bytes(), **{"context": 64, **settings})
    model.generation_config.eos_token_id = None
    batcher._ends = frozenset()
    yield batcher
    assert batcher.close(timeout=20), "the worker hangs"


def tokens(stream: Stream) -> list[int]:
    return [event.token for event in stream if event.token is not None]


BATCHED = families("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe", "olmoe")
ALONE = families("qwen3_next", "jamba")


@pytest.mark.parametrize("family", [*BATCHED, *ALONE])
def test_joins_and_leaves_at_random(family: str) -> None:
    model = tiny_model(family, **({"sliding_window": 6} if family == "mixtral" else {}))
    chance = random.Random(family)
    prompts = [tuple(chance.randrange(3, 50) for _ in range(chance.randint(1, 20))) for _ in range(10)]
    counts = [chance.randint(1, 12) for _ in prompts]
    wanted = [alone(model, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    together: list[int] = []

    class Look(Observer):
        def step(self, running: Sequence[Stream], seconds: float) -> None:
            together.append(len(running))
            time.sleep(chance.random() * 0.003)

    with batching(model, max_batch=4, prefill_chunk=6) as batcher:
        batcher.observe(Look())
        streams = []
        for prompt, count in zip(prompts, counts, strict=True):
            streams.append(batcher.submit(Request(prompt, max_tokens=count)))
            if chance.random() < 0.3:  # one that gives up some time later
                threading.Timer(0.01 * chance.random(), batcher.submit(Request(prompt)).cancel).start()
            time.sleep(0.01 * chance.random())
        assert [tokens(stream) for stream in streams] == wanted
    assert batcher.batched == (family not in ("qwen3_next", "jamba"))
    assert max(together) == (4 if batcher.batched else 1), "the test did not test what it says"


def test_a_seed_draws_the_same_whoever_is_there() -> None:
    model, tokenizer = demo()
    request = Request(tuple(range(30, 40)), max_tokens=20, temperature=1.0, seed=7)
    with batching(model, tokenizer) as batcher:
        first = tokens(batcher.submit(request))
        others = [batcher.submit(Request((40 + i,) * 5, temperature=1.5)) for i in range(5)]
        assert tokens(batcher.submit(request)) == first
        for other in others:
            other.cancel()
        assert tokens(batcher.submit(Request(request.prompt, max_tokens=20, temperature=1.0, seed=8))) != first


def test_events_add_up() -> None:
    model, tokenizer = demo()
    prompt = tuple(tokenizer("Once upon a time").input_ids)
    with batching(model, tokenizer) as batcher:
        events = list(batcher.submit(Request(prompt, max_tokens=20, logprobs=2)))
        text = "".join(event.text for event in events)
        ids = [event.token for event in events]
        assert text == tokenizer.decode(ids)
        assert [event.finish for event in events] == [None] * 19 + ["length"]
        assert events[-1].usage is not None
        assert (events[-1].usage.prompt_tokens, events[-1].usage.completion_tokens) == (len(prompt), 20)
        for event in events:
            assert event.logprob is not None
            assert event.logprob.top[0] == (event.token, event.logprob.logprob), "greedy"
        stop = text[len(text) // 2 : len(text) // 2 + 6]
        cut = list(batcher.submit(Request(prompt, max_tokens=20, stop=(stop,))))
        assert "".join(event.text for event in cut) == text[: text.index(stop)]
        assert cut[-1].finish == "stop"
        assert len(cut) < 20, "a place in the batch is not kept for text that nobody gets"
        batcher._ends = frozenset([ids[4]])
        ended = list(batcher.submit(Request(prompt, max_tokens=20)))
        assert ended[-1].finish == "stop"
        assert "".join(event.text for event in ended) == tokenizer.decode(ids[: ids.index(ids[4])])


class Gate:
    """Holds the model before a forward, and fails where told."""

    def __init__(self, model: Any) -> None:
        self.open = threading.Event()
        self.open.set()
        self.fails: Any = lambda ids: False
        self.calls: list[tuple[int, ...]] = []
        self.hook = model.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        assert self.open.wait(20)
        ids = tuple(kwargs["input_ids"][0].tolist())
        self.calls.append(ids)
        if self.fails(ids):
            raise CheckpointError("layer 1, expert 3: its checksum is wrong; pack the store again")


@pytest.fixture
def gate() -> Iterator[Gate]:
    found = Gate(demo()[0])
    yield found
    found.hook.remove()


def eventually(true: Any) -> None:
    until = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_prompts_come_in_chunks_between_the_steps_of_others(gate: Gate) -> None:
    model, tokenizer = demo()
    with batching(model, tokenizer, prefill_chunk=8) as batcher:
        gate.open.clear()
        first = batcher.submit(Request((5,), max_tokens=30))
        eventually(lambda: batcher.running == 1)
        second = batcher.submit(Request((6,) * 20, max_tokens=2))
        gate.open.set()
        tokens(first), tokens(second)
    sizes = [len(ids) for ids in gate.calls]
    at = sizes.index(8)
    assert sizes[at : at + 5] == [8, 1, 8, 1, 4], "a token of the first between the chunks of the second"


def test_the_queue_is_bounded_and_cancelling_frees_it(gate: Gate) -> None:
    model, tokenizer = demo()
    with batching(model, tokenizer, max_batch=2, queue=3) as batcher:
        gate.open.clear()
        streams = [batcher.submit(Request((5,), max_tokens=3)) for _ in range(5)]
        eventually(lambda: batcher.running == 2)
        assert batcher.waiting == 3
        with pytest.raises(QueueFullError, match="3 requests wait"):
            batcher.submit(Request((5,)))
        streams[4].cancel()
        assert [event.finish for event in streams[4]] == ["cancelled"], "before the model moves"
        streams[0].cancel()
        extra = batcher.submit(Request((5,), max_tokens=3))
        gate.open.set()
        assert len(tokens(extra)) == len(tokens(streams[1])) == 3
        assert list(streams[0])[-1].finish == "cancelled"
        assert batcher.running == batcher.waiting == 0


def test_no_place_to_wait_is_no_reason_not_to_run() -> None:
    model, tokenizer = demo()
    with batching(model, tokenizer, max_batch=1, queue=0) as batcher:
        assert len(tokens(batcher.submit(Request((5,), max_tokens=3)))) == 3


def test_a_failure_ends_only_whom_it_belongs_to(gate: Gate) -> None:
    model, tokenizer = demo()
    good, bad = (tuple(tokenizer(text).input_ids) for text in ("Once upon a time", "The king of England said"))
    wanted = alone(model, good, 12)
    poison = next(token for token in alone(model, bad, 9)[1:] if token not in (*wanted, *good, *bad))
    _log.setLevel("CRITICAL")
    with batching(model, tokenizer) as batcher:
        gate.open.clear()
        one, two = batcher.submit(Request(good, max_tokens=12)), batcher.submit(Request(bad, max_tokens=12))
        gate.calls.clear()
        gate.fails = lambda ids: poison in ids
        gate.open.set()
        assert tokens(one) == wanted
        seen: list[Event] = []
        with pytest.raises(CheckpointError, match="expert 3"):
            seen.extend(two)
        assert any(len(ids) == 2 and poison in ids for ids in gate.calls), "it was a shared step that failed"
        gate.fails = lambda ids: False
        assert tokens(batcher.submit(Request(good, max_tokens=12))) == wanted, "the worker lives"
    _log.setLevel("NOTSET")


def test_a_failing_prompt_and_a_failing_sink(gate: Gate) -> None:
    model, tokenizer = demo()
    _log.setLevel("CRITICAL")
    with batching(model, tokenizer) as batcher:
        gate.fails = lambda ids: ids == (9, 9)
        with pytest.raises(CheckpointError):
            list(batcher.submit(Request((9, 9))))

        def gone(event: Event) -> None:
            raise RuntimeError("event loop is closed")

        batcher.submit(Request((5,)), gone)
        assert len(tokens(batcher.submit(Request((5,), max_tokens=4)))) == 4
        eventually(lambda: batcher.running == 0)
    _log.setLevel("NOTSET")


def test_observers_know_whose_the_rows_are() -> None:
    model, tokenizer = demo()
    seen: list[tuple[int, ...]] = []

    class Rows(Observer):
        def forward(self, rows: tuple[Stream, ...]) -> None:
            assert rows is batcher.rows
            seen.append(tuple(stream.id for stream in rows))

        def token(self, stream: Stream, row: int) -> Any:
            assert batcher.rows[row] is stream
            return len(seen), row

    with batching(model, tokenizer) as batcher:
        end = batcher.observe(Rows())
        streams = [batcher.submit(Request((5,) * 4, max_tokens=5, trace=trace)) for trace in (True, False)]
        traced, plain = (list(stream) for stream in streams)
        assert seen[0] == (streams[0].id,) * 4
        assert traced[0].trace == (1, 3), "the first token comes from the last row of the prompt"
        assert tuple(stream.id for stream in streams) in seen
        assert all(event.trace is None for event in plain)
        end()
        before = len(seen)
        tokens(batcher.submit(Request((5,), max_tokens=2)))
        assert len(seen) == before


def test_an_observer_that_fails_does_not_end_the_worker() -> None:
    model, tokenizer = demo()

    class Broken(Observer):
        def step(self, running: Sequence[Stream], seconds: float) -> None:
            raise RuntimeError("a defect")

    _log.setLevel("CRITICAL")
    with batching(model, tokenizer) as batcher:
        end = batcher.observe(Broken())
        with pytest.raises(RuntimeError, match="a defect"):
            list(batcher.submit(Request((5,))))
        end()
        assert len(tokens(batcher.submit(Request((5,), max_tokens=2)))) == 2
    _log.setLevel("NOTSET")


def test_closing_finishes_what_runs(gate: Gate) -> None:
    model, tokenizer = demo()
    batcher = Batcher(model, tokenizer, context=64, max_batch=1)
    gate.open.clear()
    streams = [batcher.submit(Request((5,), max_tokens=3)) for _ in range(2)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    eventually(lambda: batcher.closing)
    with pytest.raises(BatcherClosedError):
        batcher.submit(Request((5,)))
    gate.open.set()
    closing.join(10)
    assert not batcher.alive
    assert [len(tokens(stream)) for stream in streams] == [3, 3]


@pytest.mark.parametrize("drain", [True, False])
def test_closing_gives_up_after_a_limit(gate: Gate, drain: bool) -> None:
    model, tokenizer = demo()
    batcher = Batcher(model, tokenizer, context=256, max_batch=1)
    gate.fails = lambda ids: time.sleep(0.01)
    streams = [batcher.submit(Request((5,))) for _ in range(2)]
    assert batcher.close(drain=drain, timeout=0.2) is not drain
    assert {list(stream)[-1].finish for stream in streams} == {"cancelled"}
    assert not batcher.alive


def test_what_does_not_fit_is_refused_at_once() -> None:
    model, tokenizer = demo()
    with batching(model, tokenizer) as batcher:
        with pytest.raises(FieldError, match="context of 64"):
            batcher.submit(Request((5,) * 64))
        with pytest.raises(FieldError, match="vocabulary"):
            batcher.submit(Request((4096,)))
    for bad in ({"context": 1}, {"max_batch": 0}, {"queue": -1}, {"prefill_chunk": True - 1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            Batcher(model, tokenizer, **{"context": 64, **bad})


def test_caches_are_freed() -> None:
    model, tokenizer = demo()
    with batching(model, tokenizer) as batcher:
        gone = []

        class Watch(Observer):
            def step(self, running: Sequence[Stream], seconds: float) -> None:
                gone.extend(weakref.ref(run.cache) for run in batcher._running if run.cache)

        batcher.observe(Watch())
        tokens(batcher.submit(Request((5,), max_tokens=10)))
        eventually(lambda: batcher.running == 0)
        gc.collect()
        assert len(gone) > 5
        assert not any(cache() for cache in gone)
