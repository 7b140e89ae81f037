"""flashmoe bench serve: a short load on a server of its own, conversations, and what it says of a bad server."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashmoe.bench.serve_client import Endpoint, Request, ServerError, started
from flashmoe.bench.serve_load import LoadOptions, _fairness, _Memory, _rank, run_load
from flashmoe.cli import main

OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
SERVER = ["--memory", "700MiB", "--context", "1024"]


def test_four_clients_for_three_seconds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    words = [*SERVER, "--clients", "4", "--seconds", "3", "--tokens", "8", "--parallel", "2"]
    assert main(["bench", "serve", *words, "--json", "--results", str(results)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(results.read_text()) == report
    result = report["results"]
    assert result["errors"] == {}
    assert result["answers"] > 0
    assert 8 * result["answers"] >= result["tokens"] - 4 * 8 > 0, "no answer is longer, and four may be cut"
    assert (
        0 < result["first_token_s"]["p50"] <= result["first_token_s"]["p95"] <= result["first_token_s"]["max"]
    )
    assert 0 < result["tokens_per_client"]["min"] <= result["tokens_per_client"]["max"]
    assert 0.5 < result["fairness"] <= 1.0
    assert result["cached_tokens"] > 0
    assert len(result["memory"]["bytes"]) == 5
    assert all(100 << 20 < nbytes < 700 << 20 for nbytes in result["memory"]["bytes"])


def test_conversations(capsys: pytest.CaptureFixture[str], demo_bundle: Path) -> None:
    words = ["--conversation", "300", "--side-by-side", "2", "--tokens", "4", "--memory", "700MiB"]
    assert main(["bench", "serve", str(demo_bundle), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("turn 1: first token after")
    assert "prompt of 29" in lines[0] or "prompt of 300" in lines[0]
    assert lines[0].endswith(" 0 from the cache")
    assert not lines[1].endswith(" 0 from the cache")
    assert lines[-1].startswith("the second turn begins after")


def whole_request(connection: socket.socket) -> bytes:
    """Head and body come in two pieces; closing with one of them unread would be a reset, not an end."""
    received = connection.recv(1 << 16)
    length = re.search(rb"content-length: (\d+)", received, re.IGNORECASE)
    body = int(length[1]) if length else 0
    while received and len(received.partition(b"\r\n\r\n")[2]) < body:
        received += connection.recv(1 << 16)
    return received


@pytest.fixture
def bad_server() -> Iterator[tuple[Endpoint, list[bytes]]]:
    """Answers with the next text (nothing when there is none), and closes the connection; its metrics are good."""
    replies: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    if whole_request(connection).startswith(b"GET /metrics "):
                        connection.sendall(OK + b"flashmoe_memory_bytes 5.0\n")
                    else:
                        connection.sendall(replies.pop(0) if replies else b"")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}"), replies
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"", "broke"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nbusy", "status 503: busy"),
        (OK + b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n', "ended early after 1 pieces"),
        (OK + b'data: {"error": {"message": "no expert"}}\n', "no expert"),
        (OK.replace(b"close", b"close\r\nContent-Length: 99") + b": x\n", "ended early after 0 pieces"),
    ],
)
def test_what_is_an_error(bad_server: tuple[Endpoint, list[bytes]], reply: bytes, message: str) -> None:
    endpoint, replies = bad_server
    replies.append(reply)
    with pytest.raises(ServerError, match=message):
        Request(endpoint, "POST", "/v1/chat/completions", {}).answer()


def test_errors_are_counted(bad_server: tuple[Endpoint, list[bytes]]) -> None:
    endpoint, replies = bad_server
    replies.append(b"HTTP/1.1 500 No\r\n\r\noops")
    result = run_load(endpoint, LoadOptions(clients=1, seconds=1.2, tokens=1))
    errors = result["errors"]
    assert errors.pop("status 500: oops") == 1
    assert all("broke" in text for text in errors)
    assert sum(errors.values()) > 0
    assert (result["answers"], result["first_token_s"]["p50"]) == (0, None)
    assert result["memory"]["bytes"] == [5] * 5
    with pytest.raises(ServerError, match="has no metric flashmoe_tea"):
        endpoint.metric("flashmoe_tea")


def test_a_server_that_cannot_start(demo_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(Exception, match="the smallest that works"),
        started(str(demo_bundle), ["--memory", "9MiB"]),
    ):
        pass
    assert main(["bench", "serve", "--url", "ftp://x"]) == 1
    assert "write it like http://" in capsys.readouterr().err
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    assert main(["bench", "serve", "x", "--url", "http://127.0.0.1:9"]) == 1
    assert "exclude each other" in capsys.readouterr().err


def test_numbers() -> None:
    values = [float(i) for i in range(1, 21)]
    assert [_rank(values, share) for share in (0.5, 0.95, 1.0)] == [10.0, 19.0, 20.0]
    assert _rank([3.0], 0.5) == 3.0
    assert _rank([], 0.5) is None
    assert _fairness([7, 7, 7]) == 1.0
    assert _fairness([0, 0, 0, 9]) == 0.25
    assert _fairness([0, 0]) is None
    memory = _Memory([(0.0, 50.0), *((float(t), 100.0 + 2.0 * t) for t in range(5, 101, 5))])
    report: dict[str, Any] = memory.report(100.0)
    assert report == {"bytes": [50, 150, 200, 250, 300], "slope_bytes_per_minute": 120}
