"""Errors in the form that OpenAI's clients read: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from collegium.decode import BatcherClosedError, FieldError, QueueFullError
from collegium.errors import CollegiumError, ConfigError

__all__ = ["ApiError", "ClientGone", "error_response", "translate"]

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ClientGone(Exception):
    """The client closed the connection; nobody waits for the answer."""


class ApiError(Exception):
    """An answer with an HTTP status of 400 or above.

    Attributes:
        status: of HTTP.
        message: what was wrong and what to do.
        param: the field of the request that is to blame.
        code: for programs, such as "model_not_found".
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def content(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def error_response(error: ApiError) -> JSONResponse:
    """The answer; it says when to come back, and closes a connection whose body was not read."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 413: {"Connection": "close"}}.get(error.status, {})
    if error.status in (429, 503):
        headers = {"Retry-After": "1"}
    return JSONResponse(error.content(), error.status, headers)


def translate(error: Exception, renamed: dict[str, str] | None = None) -> ApiError:
    """What to tell the client of an error below. Only errors of ours are repeated: others may hold anything.

    Args:
        renamed: field of a `Request` -> field of the body that it came from.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FieldError):
        too_long = "context" in str(error)
        field = (renamed or {}).get(error.field, error.field)
        return ApiError(400, str(error), param=field, code="context_length_exceeded" if too_long else None)
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, BatcherClosedError):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, ConfigError):
        return ApiError(400, str(error))
    if isinstance(error, CollegiumError):
        return ApiError(500, str(error), code="model_failed")
    return ApiError(500, f"the model failed ({type(error).__name__}); the log of the server says more", code="failed")
