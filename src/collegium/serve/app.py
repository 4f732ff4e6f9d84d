"""The application: routes, who may use them, and what happens when something fails."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from collegium import decode
from collegium.decode import Batcher, Event
from collegium.serve.answers import Answer
from collegium.serve.bodies import ChatBody, CompletionBody, parse
from collegium.serve.errors import ApiError, ClientGone, error_response, translate
from collegium.serve.follow import follow
from collegium.serve.metrics import Metrics
from collegium.serve.prompts import Prompts
from collegium.serve.routing_trace import Engine, RoutingTrace

__all__ = ["build_app"]

_log = logging.getLogger(__name__)

CLIENT_GONE = 499


def build_app(
    batcher: Batcher,
    *,
    model_name: str,
    api_key: str | None = None,
    engine: Engine | None = None,
    chat_template: str | None = None,
    allowed_hosts: Sequence[str] | None = None,
    max_body: int | None = None,
) -> FastAPI:
    """The server over a batcher.

    Args:
        model_name: what clients call the model.
        api_key: needed for everything but the page and the health check; None lets everybody in.
        engine: counts for the metrics, and tells where a traced request's experts came from.
        chat_template: a jinja template that stands in for the tokenizer's own.
        allowed_hosts: names by which the server may be addressed (the Host header); None is any. A server on loopback
            should name its own, or any web page can reach it by a name that resolves to 127.0.0.1.
        max_body: bytes of a request's body; None is 64 per token of the context, and 256 KiB.
    """
    batcher_metrics, tracer = Metrics(batcher, engine), RoutingTrace(batcher.model, engine)
    batcher.observe(batcher_metrics)
    batcher.observe(tracer)
    limit = max_body or 2**18 + 64 * batcher.context
    prompts = Prompts(batcher.tokenizer, chat_template)
    service = _Service(batcher, model_name, api_key, prompts, tracer, batcher_metrics, limit, int(time.time()))
    # the bodies are read by hand, so the pages that describe them would be empty
    app = FastAPI(title="Collegium", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.batcher = batcher
    page = files("collegium.serve").joinpath("static/chat.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _policy(page),
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }

    @app.get("/")
    async def show_page() -> Response:
        return HTMLResponse(page, headers=headers)

    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/metrics", service.metrics, methods=["GET"])
    app.add_api_route("/v1/models", service.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", service.one_model, methods=["GET"])
    app.add_api_route("/v1/completions", service.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _defect)
    if allowed_hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False)
    return app


@dataclass(frozen=True, eq=False)
class _Asked:
    """One request, ready to be run and answered."""

    request: decode.Request
    answer: Answer
    stream: bool
    echo: str
    start: float


@dataclass(frozen=True, eq=False)
class _Service:
    """What the routes do."""

    batcher: Batcher
    name: str
    api_key: str | None
    prompts: Prompts
    tracer: RoutingTrace
    counted: Metrics
    max_body: int
    created: int

    async def health(self) -> Response:
        """200 while requests are taken."""
        status = "ok" if self.batcher.alive and not self.batcher.closing else "draining"
        if not self.batcher.alive:
            status = "stopped"
        content = {"status": status, "running": self.batcher.running, "waiting": self.batcher.waiting}
        return JSONResponse(content, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        """In Prometheus' text format."""
        self._authorise(request)
        return Response(self.counted.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """The one model, and what a page wants to know of it."""
        self._authorise(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request, name: str) -> Response:
        """The same by its name."""
        self._authorise(request)
        self._check_name(name)
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response:
        """Continue a text."""

        def prepare(raw: bytes, start: float) -> _Asked:
            body = parse(raw, CompletionBody)
            self._check_name(body.model)
            settings, prompt = body.settings(), body.one_prompt()
            ids = self.prompts.text(prompt) if isinstance(prompt, str) else tuple(prompt)
            asked = self._asked(body, ids, settings, start)
            if not body.echo:
                return asked
            return replace(asked, echo=prompt if isinstance(prompt, str) else self.prompts.decode(ids))

        return await self._respond(request, prepare)

    async def chat(self, request: Request) -> Response:
        """Answer the messages of a chat."""

        def prepare(raw: bytes, start: float) -> _Asked:
            body = parse(raw, ChatBody)
            self._check_name(body.model)
            settings = body.settings()
            return self._asked(body, self.prompts.chat(body.messages), settings, start)

        return await self._respond(request, prepare)

    def _asked(
        self, body: ChatBody | CompletionBody, ids: tuple[int, ...], settings: dict[str, Any], start: float
    ) -> _Asked:
        if body.trace and self.tracer.missing:
            raise ApiError(400, f"requests cannot be traced: {self.tracer.missing}", param="trace")
        chat = isinstance(body, ChatBody)
        renamed = {"prompt": "messages", "logprobs": "top_logprobs"} if chat else {}
        if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
            renamed["max_tokens"] = "max_completion_tokens"
        try:
            request = decode.Request(ids, **settings)
            request.fit(self.batcher.context, self.batcher.vocabulary)
        except decode.FieldError as error:
            raise translate(error, renamed) from error
        answer = Answer(chat, self.name, self.batcher.tokenizer, include_usage=body.include_usage)
        return _Asked(request, answer, body.stream, "", start)

    async def _respond(self, request: Request, prepare: Any) -> Response:
        """Read, run and answer; every way out is counted, a stream's when it ends."""
        start = time.perf_counter()
        try:
            self._authorise(request)
            raw = await self._body(request)
            # a long prompt takes time to encode
            asked = await run_in_threadpool(prepare, raw, start)
            return await self._run(asked, request)
        except (ClientGone, ClientDisconnect):
            self.counted.request(CLIENT_GONE)
            return Response(status_code=CLIENT_GONE)
        except Exception as error:
            refused = self._told(error)
            self.counted.request(refused.status)
            return error_response(refused)

    async def _run(self, asked: _Asked, request: Request) -> Response:
        async with AsyncExitStack() as stack:
            events = await stack.enter_async_context(follow(self.batcher, asked.request, request.receive))
            # before the status is sent, so that a failure can still have its own
            first = await anext(events)
            self.counted.first_token(time.perf_counter() - asked.start)
            if asked.stream:
                later = stack.pop_all()
                chunks = self._chunks(asked, first, events, later)
                return StreamingResponse(
                    chunks,
                    media_type="text/event-stream",
                    headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                )
            found = [self._check_end(first), *[self._check_end(event) async for event in events]]
        self.counted.request(200)
        return JSONResponse(asked.answer.whole(found, echo=asked.echo))

    async def _chunks(
        self, asked: _Asked, first: Event, events: AsyncIterator[Event], later: AsyncExitStack
    ) -> AsyncIterator[str]:
        """The lines of a stream. `later` lets go of the request, when it has ended or nobody listens any more."""
        status, last = CLIENT_GONE, first
        try:
            async with later:
                yield _line(asked.answer.opening(asked.echo))
                yield _line(asked.answer.chunk(self._check_end(first)))
                async for last in events:
                    yield _line(asked.answer.chunk(self._check_end(last)))
                yield _line(asked.answer.closing(last))
                yield "data: [DONE]\n\n"
                status = 200
        except ClientGone:
            return
        except Exception as error:
            refused = self._told(error)
            status = refused.status
            yield _line(refused.content())
        finally:
            self.counted.request(status)

    def _check_end(self, event: Event) -> Event:
        """Count a request that has ended. Raises ApiError if it was not the client who ended it early."""
        if event.finish is not None:
            self.counted.tokens(event.usage)
        if event.finish == "cancelled":
            raise ApiError(503, "the server is shutting down; the text ends early", code="shutting_down")
        return event

    def _told(self, error: Exception) -> ApiError:
        told = translate(error)
        if told.status == 500:
            _log.error("a request failed", exc_info=error)
        return told

    async def _body(self, request: Request) -> bytes:
        """Raises ApiError if it is not JSON by its header, or too long."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # a page of another origin can send any other type without asking first
            raise ApiError(415, "the Content-Type must be application/json")
        too_long = ApiError(413, f"the body is longer than {self.max_body} bytes; shorten the prompt")
        length = request.headers.get("content-length", "")
        # as text first: int() refuses thousands of digits
        if length.isdecimal() and (len(length) > 15 or int(length) > self.max_body):
            raise too_long
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.max_body:
                raise too_long
        return bytes(body)

    def _authorise(self, request: Request) -> None:
        if self.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # headers are read as latin-1, whatever they hold
        same = hmac.compare_digest(key.strip().encode("latin-1"), self.api_key.encode())
        if scheme.lower() != "bearer" or not same:
            raise ApiError(401, "the API key is missing or wrong (Authorization: Bearer KEY)", code="invalid_api_key")

    def _check_name(self, name: str) -> None:
        # a comparison, and nothing else: a name is never a path
        if name != self.name:
            shown = name if len(name) <= 80 else f"{name[:80]}..."
            raise ApiError(
                404, f"there is no model {shown!r} here; it is {self.name!r}", param="model", code="model_not_found"
            )

    def _model(self) -> dict[str, Any]:
        about = {
            "context": self.batcher.context,
            "chat": self.prompts.chats,
            "traces": self.tracer.missing is None,
            "experts": [{"layer": layer, "experts": count} for layer, count in sorted(self.tracer.layers.items())],
        }
        head = {"id": self.name, "object": "model", "created": self.created, "owned_by": "collegium"}
        return {**head, "collegium": about}


def _line(content: dict[str, Any] | None) -> str:
    """One server-sent event; nothing for None."""
    return "" if content is None else f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def _policy(page: str) -> str:
    """A content security policy that allows the page's own script and style, by their hashes, and nothing else."""
    hashes = {}
    for tag in ("script", "style"):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that are not there, in the same form as all other errors."""
    assert isinstance(error, HTTPException)
    response = error_response(ApiError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}"))
    response.headers.update(error.headers or {})
    return response


async def _defect(request: Request, error: Exception) -> Response:
    return error_response(translate(error))
