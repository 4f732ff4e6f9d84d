"""What a client gets, in OpenAI's JSON forms: whole answers, and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from collegium.decode import Event, TokenLogprob, Usage

__all__ = ["Answer"]

FINISHED = ("stop", "length")


class Answer:
    """Writes one request's answer.

    Args:
        chat: in the form of a chat completion, else of a text completion.
        model: its name.
        tokenizer: to write tokens as text where log-probabilities are asked for.
        include_usage: chunks have a usage, null in all but the last.
    """

    def __init__(self, chat: bool, model: str, tokenizer: Any, *, include_usage: bool = False) -> None:
        self._chat, self._tokenizer, self._include_usage = chat, tokenizer, include_usage
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._offset = 0

    def whole(self, events: Sequence[Event], *, echo: str = "") -> dict[str, Any]:
        """The answer without a stream."""
        text = echo + "".join(event.text for event in events)
        finish, logprobs = events[-1].finish, self._logprobs(events)
        content: dict[str, Any] = {"text": text}
        if self._chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        answer = {
            **self._head,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [{"index": 0, **content, "logprobs": logprobs, "finish_reason": finish}],
            "usage": _usage(events[-1].usage),
        }
        traces = [_trace(event) for event in events if event.trace is not None]
        return {**answer, "collegium": {"trace": traces}} if traces else answer

    def opening(self, echo: str = "") -> dict[str, Any] | None:
        """What comes before the first token: the role in a chat, the prompt where it is to be repeated."""
        if self._chat:
            return self._chunk({"delta": {"role": "assistant", "content": ""}})
        return self._chunk({"text": echo}) if echo else None

    def chunk(self, event: Event) -> dict[str, Any] | None:
        """The chunk of one token; None where there is nothing to tell."""
        finish = event.finish if event.finish in FINISHED else None
        if not (event.text or event.logprob or event.trace is not None or finish):
            return None
        content: dict[str, Any] = {"text": event.text}
        if self._chat:
            content = {"delta": {"content": event.text} if event.text or not finish else {}}
        logprobs = None if event.logprob is None else self._logprobs([event])
        chunk = self._chunk(content, finish, logprobs)
        return chunk if event.trace is None else {**chunk, "collegium": {"trace": _trace(event)}}

    def closing(self, event: Event) -> dict[str, Any] | None:
        """The chunk behind the last token: how many there were, if that was asked for."""
        if not self._include_usage:
            return None
        return {**self._chunk({}), "choices": [], "usage": _usage(event.usage)}

    def _chunk(self, content: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        chunk = {
            **self._head,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "choices": [{"index": 0, **content, "logprobs": logprobs, "finish_reason": finish}],
        }
        return {**chunk, "usage": None} if self._include_usage else chunk

    def _logprobs(self, events: Sequence[Event]) -> dict[str, Any] | None:
        found = [event.logprob for event in events if event.logprob is not None]
        if not found:
            return None
        if self._chat:
            return {"content": [self._chat_logprob(one) for one in found], "refusal": None}
        texts = [self._text(one.token) for one in found]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [{self._text(token): value for token, value in one.top} for one in found],
            "text_offset": offsets,
        }

    def _chat_logprob(self, one: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token, value) for token, value in one.top]
        return {**self._token(one.token, one.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        # the bytes of half a character are not in its text
        exact = None if "\ufffd" in text else list(text.encode("utf-8", "surrogatepass"))
        return {"token": text, "logprob": logprob, "bytes": exact}

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))


def _usage(usage: Usage | None) -> dict[str, int] | None:
    if usage is None:
        return None
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _trace(event: Event) -> dict[str, Any]:
    return {"token": event.token, "layers": event.trace}
