"""The application: routes, limits, keys and errors."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashmoe.errors import FlashmoeError
from flashmoe.server import (
    anthropic_messages,
    machine,
    openai_chat,
    openai_completions,
    openai_responses,
    page,
    status,
)
from flashmoe.server.problems import body_of, status_of
from flashmoe.server.responses_store import ResponseStore
from flashmoe.server.service import Service
from flashmoe.server.streaming import ClientLeft

_OPEN_PATHS = ("/health", "/")  # and the files of the page
_CLIENT_LEFT = 499  # nobody reads it; as nginx counts such requests


@dataclass(frozen=True)
class Limits:
    """What a request may have.  Bytes."""

    api_key: str | None = None
    body_nbytes: int = 4 << 20


def create_app(service: Service, limits: Limits | None = None) -> FastAPI:
    """The ASGI application over a service that has been started."""
    limits = limits or Limits()
    app = FastAPI(title="flashmoe", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service, app.state.responses = service, ResponseStore()
    app.include_router(openai_chat.router)
    app.include_router(openai_completions.router)
    app.include_router(openai_responses.router)
    app.include_router(anthropic_messages.router)
    app.include_router(status.router)
    app.include_router(page.router)
    app.include_router(machine.router)
    app.add_exception_handler(FlashmoeError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientLeft, _on_left)
    app.add_middleware(BodyLimit, most=limits.body_nbytes)
    if limits.api_key is not None:
        app.middleware("http")(_key_check(limits.api_key))
    return app


Handler = Callable[[Request], Awaitable[Response]]


def _key_check(key: str) -> Callable[[Request, Handler], Awaitable[Response]]:
    async def check(request: Request, call_next: Handler) -> Response:
        path = request.url.path
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        given = request.headers.get("x-api-key", given)
        # Compared as bytes: a header may hold anything, and compare_digest wants ASCII in texts.
        is_open = path in _OPEN_PATHS or path.startswith(page.PREFIX)
        if not is_open and not hmac.compare_digest(given.encode(), key.encode()):
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            return JSONResponse(body_of(path, 401, message), 401, {"WWW-Authenticate": "Bearer"})
        return await call_next(request)

    return check


class BodyLimit:
    """Refuses bodies that are too long, by their announced length or as they come (413)."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self._most:
            await self._refuse(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, counted, send)

    @property
    def _message(self) -> str:
        return f"the request is longer than {self._most} bytes: shorten it, or raise --max-body"

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(body_of(scope["path"], 413, self._message), 413)(scope, receive, send)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FlashmoeError)
    status_code, message = status_of(error), " ".join(str(error).split())
    headers = {"Retry-After": "1"} if status_code in (429, 503) else None
    field, code = getattr(error, "param", None), getattr(error, "code", None)
    body = body_of(request.url.path, status_code, message, field, code)
    return JSONResponse(body, status_code, headers)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = dict(error.errors()[0])
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"{where}: {first['msg']}" if where else str(first["msg"])
    return JSONResponse(body_of(request.url.path, 400, message, where or None), 400)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = error.status_code if error.status_code in (400, 401, 404, 413, 429, 503) else 400
    message = str(error.detail)
    if error.status_code == 404:
        message = f"{request.method} {request.url.path} does not exist here"
    return JSONResponse(body_of(request.url.path, known, message), error.status_code, error.headers)


async def _on_left(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)
