"""The same limits on every API, each refusal in that API's own form."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from tests.server.conftest import KEY, Running

HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
TEXT = "Tell me of the sea."
MESSAGES = [{"role": "user", "content": TEXT}]
APIS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/completions": {"prompt": TEXT, "max_tokens": 4},
    "/v1/responses": {"input": TEXT, "max_output_tokens": 4},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
}


@pytest.fixture(params=APIS)
def path(server: Running, request: pytest.FixtureRequest) -> Any:
    yield request.param
    server.wait_until_idle()
    answer = httpx.post(server.url + request.param, json=APIS[request.param], headers=HEADERS, timeout=60)
    assert answer.status_code == 200, "whatever was refused, the next request is served"


def refusal(path: str, answer: httpx.Response) -> tuple[int, str]:
    """(status, type of the error) of an answer in the API's form."""
    body = answer.json()
    error = body["error"]
    assert error["message"]
    assert "\n" not in error["message"]
    assert (body.get("type") == "error") == path.startswith("/v1/messages")
    return answer.status_code, error["type"]


def send(server: Running, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + path, content=content, headers=HEADERS | headers, timeout=60)


def longer(path: str) -> dict[str, Any]:
    """A prompt of more tokens than the context has."""
    text = "word " * 4000
    body = APIS[path]
    if "messages" in body:
        return body | {"messages": [{"role": "user", "content": text}]}
    return body | {"prompt" if "prompt" in body else "input": text}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model": "demo"}'])
def test_a_body_that_is_no_request(server: Running, path: str, body: bytes) -> None:
    assert refusal(path, send(server, path, body)) == (400, "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long(server: Running, path: str, stream: bool) -> None:
    answer = send(server, path, longer(path) | {"stream": stream})
    assert refusal(path, answer) == (400, "invalid_request_error")
    assert "raise --context" in answer.json()["error"]["message"]


def test_a_wrong_key(server: Running, path: str) -> None:
    answer = send(server, path, APIS[path], Authorization="Bearer wrong")
    assert refusal(path, answer) == (401, "authentication_error")


def test_ten_megabytes(server: Running, path: str) -> None:
    status, kind = refusal(path, send(server, path, b" " * (10 << 20)))
    assert status == 413
    assert kind == ("request_too_large" if path == "/v1/messages" else "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_wait(server: Running, path: str, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service.scheduler, "_most_waiting", 0)
    answer = send(server, path, APIS[path] | {"stream": stream})
    assert refusal(path, answer) == (429, "rate_limit_error")
    assert answer.headers["retry-after"] == "1"
    monkeypatch.undo()


@pytest.mark.parametrize("stream", [False, True])
def test_the_server_is_ending(
    server: Running, path: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.service.scheduler, "_accepting", False)
    answer = send(server, path, APIS[path] | {"stream": stream})
    kind = "overloaded_error" if path == "/v1/messages" else "server_error"
    assert refusal(path, answer) == (503, kind)
    monkeypatch.undo()


def test_nothing_here(server: Running) -> None:
    for path in ("/v1/nothing", "/v1/messages/nothing", "/v1/responses/nothing"):
        answer = httpx.get(server.url + path, headers=HEADERS)
        assert refusal(path, answer) == (404, "not_found_error")
