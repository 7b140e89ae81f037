"""Errors as HTTP answers, in each API's own form."""

from __future__ import annotations

from typing import Any

from flashmoe.errors import BusyError, ConfigError, FlashmoeError, PromptError, RequestError, StructureError

_BAD_REQUEST = (PromptError, ConfigError, StructureError)
_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def status_of(error: FlashmoeError) -> int:
    """The HTTP status: whose fault it was."""
    if isinstance(error, (RequestError, *_BAD_REQUEST)):
        return 400
    if isinstance(error, BusyError):
        return 503 if "shutting down" in str(error) else 429
    return 500


def openai_error(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error in OpenAI's form."""
    return {"error": {"message": message, "type": _OPENAI_TYPES[status], "param": param, "code": code}}


def anthropic_error(status: int, message: str) -> dict[str, Any]:
    """The body of an error in Anthropic's form."""
    return {"type": "error", "error": {"type": _ANTHROPIC_TYPES[status], "message": message}}


def body_of(
    path: str, status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body in the form of the API that a path belongs to."""
    if path.startswith("/v1/messages"):
        return anthropic_error(status, message)
    return openai_error(status, message, param, code)
