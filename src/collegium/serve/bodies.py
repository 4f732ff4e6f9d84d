"""What a client may send, and the settings it makes for a request. Ranges are checked by `Request` itself."""

from __future__ import annotations

import json
from typing import Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from collegium.serve.errors import ApiError

__all__ = ["ChatBody", "CompletionBody", "Message", "parse"]


class _Strict(BaseModel):
    """No conversions, and no field that would be ignored without a word."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class _Body(_Strict):
    """Fields of both endpoints."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int | None = None
    trace: bool = False
    logit_bias: dict[str, Any] | None = None
    # about the caller, not the text
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    def settings(self) -> dict[str, Any]:
        """Fields of a `Request`, all but the prompt.

        Raises:
            ApiError: something is asked for that is not offered.
        """
        if self.n not in (None, 1):
            raise ApiError(400, f"n must be 1, not {self.n}: send as many requests instead", param="n")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
        self._refuse("logit_bias")
        same = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "trace")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return {
            **{name: getattr(self, name) for name in same},
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "stop": stop,
        }

    @property
    def include_usage(self) -> bool:
        """A last chunk is to tell the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _refuse(self, *names: str) -> None:
        for name in names:
            if getattr(self, name):
                raise ApiError(400, f"{name} is not offered; leave it out", param=name)


class CompletionBody(_Body):
    """``/v1/completions``"""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None

    def settings(self) -> dict[str, Any]:
        self._refuse("suffix")
        if self.best_of not in (None, 1):
            raise ApiError(400, f"best_of must be 1, not {self.best_of}", param="best_of")
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "logprobs of the prompt are not offered; leave out echo or logprobs", param="echo")
        return {**super().settings(), "logprobs": self.logprobs}

    def one_prompt(self) -> str | list[int]:
        """The prompt. Raises ApiError if there are several, or none."""
        if isinstance(self.prompt, str):
            return self.prompt
        several = [one for one in self.prompt if not isinstance(one, int)]
        if not several:
            return [one for one in self.prompt if isinstance(one, int)]
        if len(several) > 1:
            raise ApiError(400, f"one prompt a request, not {len(several)}: send as many requests", param="prompt")
        return several[0]


class ChatBody(_Body):
    """``/v1/chat/completions``"""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None
    function_call: Any = None
    response_format: dict[str, Any] | None = None

    def settings(self) -> dict[str, Any]:
        self._refuse("tools", "functions")
        if self.response_format not in (None, {"type": "text"}):
            raise ApiError(400, "response_format must be of type text", param="response_format")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        settings = super().settings()
        if self.max_completion_tokens is not None:
            settings["max_tokens"] = self.max_completion_tokens
        return {**settings, "logprobs": (self.top_logprobs or 0) if self.logprobs else None}


Body = TypeVar("Body", bound=_Body)


def parse(raw: bytes, kind: type[Body]) -> Body:
    """A body from its bytes.

    Raises:
        ApiError: it is no JSON, holds NaN or infinity, or a field is missing, unknown or of the wrong type.
    """
    try:
        found = json.loads(raw, parse_constant=_no_constant)
    # numbers of thousands of digits are ValueErrors, brackets by the thousand RecursionErrors
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(found).__name__}")
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # an alternative of a union adds its own names behind the field's
        field = str(first["loc"][0])
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            raise ApiError(400, f"unknown field {field[:60]!r}", param=field[:60]) from None
        raise ApiError(400, f"{field}: {first['msg']}", param=field) from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")
