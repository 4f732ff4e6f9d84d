"""What is asked of a `Batcher`, checked when it is made, and what comes back."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from collegium.errors import CollegiumError, ConfigError

__all__ = [
    "BatcherClosedError",
    "Event",
    "FieldError",
    "Finish",
    "QueueFullError",
    "Request",
    "TokenLogprob",
    "Usage",
]

Finish = Literal["stop", "length", "cancelled", "error"]

MAX_STOPS, MAX_STOP_LENGTH, MAX_LOGPROBS = 16, 1000, 20


class FieldError(ConfigError):
    """A field of a request is not allowed; ``field`` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class QueueFullError(CollegiumError):
    """So many requests wait already that no more are taken; try again later."""


class BatcherClosedError(CollegiumError):
    """The batcher is closing and takes no new requests."""


@dataclass(frozen=True)
class Range:
    """Allowed values of one field: ``low <= value <= high``, or ``low < value`` with `open`."""

    low: float
    high: float
    whole: bool = False
    open: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises FieldError if `value` is not such a number."""
        number = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)
        # an int of any size compares with a float; only a float can be NaN
        if number and not (isinstance(value, float) and math.isnan(value)):
            above = value > self.low if self.open else value >= self.low
            if above and value <= self.high:
                return
        kind = "a whole number" if self.whole else "a number"
        bounds = f"above {self.low:g}" if self.open else f"at least {self.low:g}"
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
        raise FieldError(name, f"{name} must be {kind} {bounds} and at most {self.high:g}, not {shown}")


RANGES = {
    "max_tokens": Range(1, 2**31 - 1, whole=True),
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, open=True),
    "top_k": Range(0, 2**31 - 1, whole=True),
    "repetition_penalty": Range(0, 10, open=True),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "seed": Range(-(2**63), 2**63 - 1, whole=True),
    "logprobs": Range(0, MAX_LOGPROBS, whole=True),
}


@dataclass(frozen=True)
class Request:
    """One sequence to be continued. None leaves a setting to the generation config of the model.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: tokens to generate at the most; None is what the context has room for.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that together reach p.
        top_k: draw from the k likeliest tokens; 0 is all.
        repetition_penalty: above 1 makes tokens of the prompt and the text less likely (Keskar et al., 2019).
        presence_penalty: subtracted from the logit of every generated token.
        frequency_penalty: subtracted once for every time a token was generated.
        stop: texts that end the generation; they and what follows are not sent.
        seed: the same seed draws the same text, whoever else is in the batch.
        logprobs: also give the log-probability of each token and of so many likeliest ones, before any setting above.
        trace: observers are to say where this request's tokens went.

    Raises:
        FieldError: a field is of the wrong type, not finite, or out of range.
    """

    prompt: tuple[int, ...]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        optional = {field.name for field in fields(self) if field.default is None}
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if not (value is None and name in optional):
                allowed.check(name, value)
        if not self.prompt:
            raise FieldError("prompt", "prompt holds no tokens; generation needs at least one to start from")
        for token in self.prompt:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise FieldError("prompt", f"prompt must hold token ids from 0 up, not {token!r}")
        if len(self.stop) > MAX_STOPS:
            raise FieldError("stop", f"stop holds {len(self.stop)} texts; at most {MAX_STOPS} are watched for")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise FieldError("stop", f"stop must hold texts of 1 to {MAX_STOP_LENGTH} characters, not {text!r:.60}")

    def fit(self, context: int, vocabulary: int) -> int:
        """How many tokens may be generated in a context of so many tokens.

        Raises:
            FieldError: prompt and max_tokens are longer than the context, or a token id is not of the vocabulary.
        """
        room = context - len(self.prompt)
        if room < 1:
            raise FieldError(
                "prompt",
                f"the prompt has {len(self.prompt)} tokens, and the context of {context} must hold it and "
                "at least one more; shorten it",
            )
        if self.max_tokens is not None and self.max_tokens > room:
            raise FieldError(
                "max_tokens",
                f"the prompt has {len(self.prompt)} tokens and max_tokens is {self.max_tokens}, together more "
                f"than the context of {context}; ask for at most {room}",
            )
        if (highest := max(self.prompt)) >= vocabulary:
            raise FieldError("prompt", f"prompt holds token {highest}; the vocabulary has 0 to {vocabulary - 1}")
        return room if self.max_tokens is None else self.max_tokens


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token, and ``(id, log-probability)`` of the likeliest ones, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Usage:
    """Tokens of a request so far."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Event:
    """One generated token, or the end of a request; the last event of a stream has `finish`.

    Attributes:
        token: its id; None where the request ends without one (cancelled, error).
        text: what can be sent now: whole characters, and nothing that may turn out to begin a stop text.
        logprob: if the request asked.
        finish: "stop" (an end token or a stop text), "length", "cancelled" or "error".
        usage: with `finish`.
        error: what went wrong, with finish "error".
        trace: what an observer says of the token, if the request asked; see `Observer.token`.
    """

    token: int | None = None
    text: str = ""
    logprob: TokenLogprob | None = None
    finish: Finish | None = None
    usage: Usage | None = None
    error: Exception | None = None
    trace: Any = None
