"""`Batcher`: many requests, one model, continuous batching in one worker thread.

Legend: n running requests, q tokens of a prompt's chunk, V vocabulary.

A turn is one chunk of one prompt and one token of every request whose prompt is done, so a long prompt delays the
others by a chunk, not by its length; requests join and leave between turns (Orca, 2022; chunked prefill: Sarathi,
2023). Whatever a request needs is freed when it ends; how many run and wait is bounded.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collegium.decode.kv import kv_cache
from collegium.decode.ragged import RaggedStep, unbatched_reason
from collegium.decode.request import BatcherClosedError, Event, Finish, QueueFullError, Request, Usage
from collegium.decode.sampling import Sampler, Sampling, end_tokens
from collegium.decode.stream import Stream
from collegium.decode.text import Detokenizer, StopTexts
from collegium.errors import ConfigError

__all__ = ["Batcher", "Observer"]

_log = logging.getLogger(__name__)


class Observer:
    """Sees what a batcher does, in its worker thread. Does nothing itself; override what is wanted."""

    def forward(self, rows: tuple[Stream, ...]) -> None:
        """A forward of the model begins; ``rows[t]`` is whose its t-th token is."""

    def token(self, stream: Stream, row: int) -> Any:
        """A request that asks for a trace got a token from row `row` of the last forward; becomes `Event.trace`."""
        return None

    def step(self, running: Sequence[Stream], seconds: float) -> None:
        """A turn is over: who took part, and how long it took."""


@dataclass(eq=False)
class _Run:
    """A request that has a place in the batch."""

    stream: Stream
    room: int
    sampler: Sampler
    detokenizer: Detokenizer
    stops: StopTexts
    cache: Any
    fed: int = 0
    next: int | None = None  # chosen, and not yet fed to the model


class Batcher:
    """Continues the sequences of many requests with one model.

    Args:
        model: a causal language model of transformers, already loaded. Only the worker thread runs it from now on.
        tokenizer: its tokenizer.
        context: tokens of prompt and text together that a request may have.
        max_batch: requests that run at once. One where the model cannot batch; see `unbatched`.
        queue: requests that may wait beyond those.
        prefill_chunk: tokens of a prompt that go through the model at once.

    Attributes:
        context, max_batch, queue: as given.
        unbatched: why requests run one at a time, or None if they run together.
        vocabulary: token ids that the model has an embedding for.
        rows: ``rows[t]`` is the stream of token t in the current forward of the model.

    Raises:
        ConfigError: a number is out of range, or the model is no decoder.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        context: int,
        max_batch: int = 8,
        queue: int = 64,
        prefill_chunk: int = 512,
    ) -> None:
        for name, value, low in (
            ("context", context, 2),
            ("max_batch", max_batch, 1),
            ("queue", queue, 0),
            ("prefill_chunk", prefill_chunk, 1),
        ):
            if not isinstance(value, int) or value < low:
                raise ConfigError(f"{name} must be a whole number from {low} up, not {value!r}")
        if model.config.is_encoder_decoder:
            raise ConfigError(f"{type(model).__name__} has an encoder; requests are continued by a decoder alone")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.context, self.queue = context, queue
        self.unbatched = unbatched_reason(model)
        self.max_batch = 1 if self.unbatched else max_batch
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        self.rows: tuple[Stream, ...] = ()
        self._chunk = prefill_chunk
        self._ends = end_tokens(model, tokenizer)
        self._step = None if self.unbatched else RaggedStep(model)
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_only: dict[str, int] = {"logits_to_keep": 1} if keeps else {}
        self._observers: tuple[Observer, ...] = ()
        self._changed = threading.Condition()
        self._waiting: deque[Stream] = deque()
        self._running: list[_Run] = []
        self._numbered = 0
        self._closed = self._abandoned = False
        self._worker = threading.Thread(target=self._work, name="collegium-batcher", daemon=True)
        self._worker.start()

    @property
    def batched(self) -> bool:
        """Requests share forwards of the model."""
        return self.unbatched is None

    @property
    def alive(self) -> bool:
        """The worker thread lives."""
        return self._worker.is_alive()

    @property
    def closing(self) -> bool:
        """New requests are refused."""
        return self._closed

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Have `observer` called from the next turn on; the function that ends it."""
        with self._changed:
            self._observers = (*self._observers, observer)

        def end() -> None:
            with self._changed:
                self._observers = tuple(one for one in self._observers if one is not observer)

        return end

    def submit(self, request: Request, sink: Callable[[Event], None] | None = None) -> Stream:
        """Queue a request. Any thread may.

        Args:
            sink: called with each event, in the worker thread; without one the stream is iterated over.

        Raises:
            FieldError: it does not fit the context or the vocabulary.
            QueueFullError: too many wait already.
            BatcherClosedError: no requests are taken any more.
        """
        request.fit(self.context, self.vocabulary)
        with self._changed:
            if self._closed or not self.alive:
                raise BatcherClosedError("the server is shutting down and takes no new requests")
            places = self.queue + self.max_batch - len(self._running)
            if len(self._waiting) >= places:
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already, which is all the room; try again later"
                )
            self._numbered += 1
            stream = Stream(self._numbered, request, sink, self._wake)
            self._waiting.append(stream)
            self._changed.notify_all()
        return stream

    def close(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no new requests, finish those taken, and end the worker.

        Args:
            drain: finish them; otherwise they are cancelled.
            timeout: seconds after which what is left is cancelled; None waits.

        Returns:
            True if nothing was cancelled for the timeout.
        """
        with self._changed:
            self._closed = True
            self._abandoned |= not drain
            self._changed.notify_all()
        self._worker.join(timeout)
        if in_time := not self.alive:
            return in_time
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
        self._worker.join()
        return False

    def _wake(self, stream: Stream) -> None:
        """A stream was cancelled: its place in the queue is free at once."""
        with self._changed:
            waited = stream in self._waiting
            if waited:
                self._waiting.remove(stream)
            self._changed.notify_all()
        if waited:
            stream.send(Event(finish="cancelled", usage=Usage(len(stream.request.prompt), 0)))

    # the rest runs in the worker thread

    def _work(self) -> None:
        while self._wait():
            try:
                with torch.inference_mode():
                    self._turn()
            except Exception as error:  # a defect, of an observer for example, must not end the service
                _log.exception("a turn failed; its %d requests are ended", len(self._running))
                for run in list(self._running):
                    self._end(run, "error", error=error)

    def _wait(self) -> bool:
        """Wait for work, drop what was cancelled, fill the batch; False when all is done and closed."""
        with self._changed:
            while not (self._waiting or self._running or self._closed):
                self._changed.wait()
            if self._abandoned:
                for stream in (*self._waiting, *(run.stream for run in self._running)):
                    stream.cancelled = True
            admitted: list[Stream] = []
            while self._waiting and len(self._running) + len(admitted) < self.max_batch:
                admitted.append(self._waiting.popleft())
            if self._abandoned:
                admitted += self._waiting
                self._waiting.clear()
            # inside the lock, so that a request is always either waiting or running
            for stream in admitted:
                self._start(stream)
        for run in [run for run in self._running if run.stream.cancelled]:
            self._end(run, "cancelled")
        return bool(self._running or self._waiting or not self._closed)

    def _start(self, stream: Stream) -> None:
        request = stream.request
        try:
            sampler = Sampler(Sampling.of(self.model.generation_config, request), request)
            detokenizer, stops = Detokenizer(self.tokenizer), StopTexts(request.stop)
            cache = None if self.unbatched else kv_cache(self.model.config)
        except Exception as error:
            _log.exception("request %d could not start", stream.id)
            stream.send(Event(finish="error", usage=Usage(len(request.prompt), 0), error=error))
            return
        room = request.fit(self.context, self.vocabulary)
        self._running.append(_Run(stream, room, sampler, detokenizer, stops, cache))

    def _turn(self) -> None:
        """One chunk of the oldest unfinished prompt, then one token of every request whose prompt is done."""
        if not self._running:
            return
        start, present = time.perf_counter(), [run.stream for run in self._running]
        prompt = next((run for run in self._running if run.next is None), None)
        if prompt is not None:
            self._alone(prompt)
        ready = [run for run in self._running if run.next is not None and run is not prompt]
        if len(ready) == 1:
            self._alone(ready[0])
        elif ready:
            self._together(ready)
        seconds = time.perf_counter() - start
        for observer in self._observers:
            observer.step(present, seconds)

    def _alone(self, run: _Run) -> None:
        """A chunk of a prompt, or a token, through the model as anyone would call it."""
        prompt = run.stream.request.prompt
        if run.next is not None:
            ids: Sequence[int] = [run.next]
        elif self.unbatched:
            # a recurrent state is as a rule not carried over between calls of many tokens
            ids = prompt
        else:
            ids = prompt[run.fed : run.fed + self._chunk]
        try:
            self._begin((run.stream,) * len(ids))
            device = self.model.device
            output = self.model(
                input_ids=torch.tensor([list(ids)], device=device),
                past_key_values=run.cache,
                use_cache=True,
                **self._last_only,
            )
        except Exception as error:
            self._fail(run, error)
            return
        run.cache = output.past_key_values
        run.fed += len(ids)
        if run.fed >= len(prompt):
            self._accept(run, output.logits[0, -1], len(ids) - 1)

    def _together(self, runs: list[_Run]) -> None:
        """A token of each run in one forward. If it fails, each on its own, so that only what is broken ends."""
        assert self._step is not None
        try:
            self._begin(tuple(run.stream for run in runs))
            logits = self._step([run.next for run in runs if run.next is not None], [run.cache for run in runs])
        except Exception as error:
            _log.warning("a step of %d requests failed (%s); each is tried alone", len(runs), error)
            for run in runs:
                self._alone(run)
            return
        for row, run in enumerate(runs):
            run.fed += 1
            self._accept(run, logits[row], row)

    def _begin(self, rows: tuple[Stream, ...]) -> None:
        self.rows = rows
        for observer in self._observers:
            observer.forward(rows)

    def _accept(self, run: _Run, logits: Tensor, row: int) -> None:
        """Choose the next token of a run from ``[V]`` logits, send it, and end the run if that was the last."""
        stream = run.stream
        try:
            token, logprob = run.sampler(logits)
            stream.generated += 1
            run.next = token
            ended = token in self._ends
            text = "" if ended else run.stops.push(run.detokenizer.push(token))
            finish: Finish | None = None
            if run.stops.hit or ended:
                finish = "stop"
            elif stream.generated >= run.room:
                finish = "length"
            if finish and not run.stops.hit:
                text += run.stops.push(run.detokenizer.flush())
                finish = "stop" if run.stops.hit else finish
                text += run.stops.flush()
            trace = self._trace(stream, row) if stream.request.trace else None
        except Exception as error:
            self._fail(run, error)
            return
        if finish:
            self._end(run, finish, token=token, text=text, logprob=logprob, trace=trace)
        else:
            stream.send(Event(token, text, logprob, trace=trace))

    def _trace(self, stream: Stream, row: int) -> Any:
        said = (observer.token(stream, row) for observer in self._observers)
        return next((trace for trace in said if trace is not None), None)

    def _fail(self, run: _Run, error: Exception) -> None:
        _log.warning("request %d failed: %s: %s", run.stream.id, type(error).__name__, error)
        self._end(run, "error", error=error)

    def _end(self, run: _Run, finish: Finish, **event: Any) -> None:
        """Free what a run holds, then tell its caller."""
        stream = run.stream
        with self._changed:
            self._running.remove(run)
        run.cache = None
        usage = Usage(len(stream.request.prompt), stream.generated)
        stream.send(Event(finish=finish, usage=usage, **event))
