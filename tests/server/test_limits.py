"""What a hostile or clumsy client may send, and what it gets; the server goes on in every case."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.server.conftest import KEY, Running

HEADERS = {"Authorization": f"Bearer {KEY}"}
CHAT = {
    "messages": [{"role": "user", "content": "Tell me of the sea."}],
    "temperature": 0.0,
    "max_tokens": 16,
}


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:
        yield client
        # Whatever the test did, the next client is served, and the same way.
        answer = client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 16
        server.wait_until_idle()


def post(client: httpx.Client, **given: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", **given)


def error_of(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    message: str = error["message"]
    return message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"messages": 5}',
        b'{"messages": [5]}',
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps(CHAT | {"stop": 5}).encode(),
        json.dumps(CHAT | {"stream_options": "x"}).encode(),
        json.dumps(CHAT | {"messages": [{"role": "user", "content": 5}]}).encode(),
        json.dumps(CHAT | {"messages": [{"role": "user", "content": "\ud800"}]}).encode(),
        json.dumps(CHAT | {"tools": [5]}).encode(),
        json.dumps(CHAT | {"tools": [{"function": 5}]}).encode(),
        json.dumps(CHAT | {"chat_template_kwargs": {"messages": []}}).encode(),
        json.dumps(CHAT | {"seed": "x"}).encode(),
    ],
)
def test_malformed_bodies(client: httpx.Client, body: bytes) -> None:
    answer = post(client, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert error_of(answer)


def test_a_long_body(client: httpx.Client) -> None:
    answer = post(client, content=b"x" * (10 << 20))
    assert answer.status_code == 413
    assert "raise --max-body" in error_of(answer)

    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * (1 << 17)

    answer = post(
        client, content=pieces(), headers={"Content-Type": "application/json"}
    )  # its length is not told
    assert answer.status_code == 413


def test_a_wrong_key_and_open_paths(server: Running, client: httpx.Client) -> None:
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": KEY[:-1]}, {"x-api-key": "no"}):
        answer = httpx.post(server.url + "/v1/chat/completions", json=CHAT, headers=headers)
        assert answer.status_code == 401
        assert "API key" in error_of(answer)
    assert httpx.get(server.url + "/metrics").status_code == 401
    assert httpx.get(server.url + "/health").json()["status"] == "ok"
    assert httpx.get(server.url + "/v1/models", headers={"x-api-key": KEY}).status_code == 200
    assert client.get("/nowhere").status_code == 404
    assert client.get("/v1/chat/completions").status_code == 405


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"$ref": "#"}]},
        {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
        {"type": "array", "minItems": 10**9, "items": {"type": "string"}},
        {"anyOf": [{"type": "string", "maxLength": 10**7 + i} for i in range(200)]},
        {"properties": {f"p{i}": {"type": "string"} for i in range(20_000)}, "type": "object"},
    ],
)
def test_a_schema_bomb(client: httpx.Client, schema: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "bomb", "schema": schema}}
    began = time.monotonic()
    answer = post(client, json=CHAT | {"response_format": form})
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert error_of(answer)
    assert time.monotonic() - began < 60


def deep(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def test_a_deep_schema(client: httpx.Client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "bomb", "schema": deep(400)}}
    assert post(client, json=CHAT | {"response_format": form}).status_code in (200, 400)


def test_a_client_that_leaves_frees_its_place(server: Running, client: httpx.Client) -> None:
    before = server.service.scheduler.stats().finished.get("cancelled", 0)
    # A pattern without an end: left free, the model sometimes stops within the half second.
    endless = {"guided_regex": "[a-z ]{20000}"}
    long = CHAT | endless | {"max_tokens": 1800, "stream": True, "temperature": 1.0}
    with client.stream("POST", "/v1/chat/completions", json=long) as answer:
        for _, _line in zip(range(6), answer.iter_lines(), strict=False):
            pass
    # One that waits for its whole answer leaves too.
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            server.url + "/v1/chat/completions", json=long | {"stream": False}, headers=HEADERS, timeout=0.5
        )
    server.wait_until_idle()
    assert server.service.scheduler.stats().finished["cancelled"] == before + 2


def raw_request(server: Running, body: dict[str, Any]) -> socket.socket:
    """A connection that has sent a request and has read nothing."""
    content = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    connection.sendall(head.encode() + content)
    return connection


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_is_killed_while_it_waits(server: Running, client: httpx.Client, stream: bool) -> None:
    stats = server.service.scheduler.stats
    long = CHAT | {"max_tokens": 1800, "stream": True, "temperature": 1.0}
    busy = [raw_request(server, long) for _ in range(3)]
    wait_for(lambda: stats().running == 3)
    waiting = raw_request(server, CHAT | {"stream": stream})
    wait_for(lambda: stats().waiting == 1)
    # As the kernel does for a killed process with unread data: a reset instead of an orderly end.
    waiting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    waiting.close()
    wait_for(lambda: stats().waiting == 0)
    assert stats().running == 3, "nobody had to finish for that"
    for connection in busy:
        connection.close()
    server.wait_until_idle()


def test_a_stream_begins_before_its_first_token(server: Running, client: httpx.Client) -> None:
    stats = server.service.scheduler.stats
    busy = [raw_request(server, CHAT | {"max_tokens": 1800, "stream": True}) for _ in range(3)]
    wait_for(lambda: stats().running == 3)
    for path, more in (("chat/completions", CHAT), ("completions", {"prompt": "The sea"})):
        with client.stream("POST", f"/v1/{path}", json=more | {"stream": True}) as answer:
            assert answer.status_code == 200
            assert next(answer.iter_lines())
            assert stats().waiting == 1, "it has not even begun"
        wait_for(lambda: stats().waiting == 0)
    for connection in busy:
        connection.close()
    server.wait_until_idle()


def test_a_slow_reader_delays_nobody(server: Running, client: httpx.Client) -> None:
    with raw_request(server, CHAT | {"max_tokens": 300, "stream": True}) as slow:  # and reads nothing for now
        quick = post(client, json=CHAT)
        assert quick.status_code == 200
        slow.settimeout(30)
        received = b""
        while b"[DONE]" not in received:
            piece = slow.recv(2048)
            assert piece
            received += piece
    assert received.count(b"data: ") > 200


def test_a_tool_call_cut_by_a_leaving_client(server: Running, client: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    given = CHAT | {"tools": [tool], "tool_choice": "required", "stream": True, "max_tokens": 200}
    with client.stream("POST", "/v1/chat/completions", json=given) as answer:
        assert next(answer.iter_lines()).startswith("data: ")


def test_too_many_requests(server: Running, client: httpx.Client) -> None:
    def one(max_tokens: int) -> httpx.Response:
        given = CHAT | {"max_tokens": max_tokens}
        return httpx.post(server.url + "/v1/chat/completions", json=given, headers=HEADERS, timeout=120)

    with ThreadPoolExecutor(43) as pool:
        first = [pool.submit(one, 200) for _ in range(3)]
        while "flashmoe_requests_running 3.0" not in client.get("/metrics").text:
            assert not any(request.done() for request in first)
        others = list(pool.map(one, [60] * 40))
        assert all(request.result().status_code == 200 for request in first)
    assert {answer.status_code for answer in others} == {200, 429}
    # Twelve may wait while the three are answered.
    assert sum(answer.status_code == 200 for answer in others) >= 12
    refused = next(answer for answer in others if answer.status_code == 429)
    assert "try again later" in error_of(refused)
    assert refused.headers["retry-after"] == "1"


def test_many_clients_make_progress_and_leave_nothing_behind(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All may come before the scheduler has taken the first from the queue.
    monkeypatch.setattr(server.service.scheduler, "_most_waiting", 14)

    def one(number: int) -> list[float]:
        times: list[float] = []
        given = CHAT | {"max_tokens": 40, "stream": True, "seed": number, "temperature": 0.8}
        with httpx.stream(
            "POST", server.url + "/v1/chat/completions", json=given, headers=HEADERS, timeout=120
        ) as answer:
            assert answer.status_code == 200
            lines = (line for line in answer.iter_lines() if '"content"' in line)
            times += [time.monotonic() for _ in lines]
        return times

    with ThreadPoolExecutor(14) as pool:
        results = list(pool.map(one, range(14)))
    assert all(len(times) > 20 for times in results)
    server.wait_until_idle()
    metrics = client.get("/metrics").text
    assert "flashmoe_requests_running 0.0" in metrics
    assert len(server.service.scheduler._places) == 3
