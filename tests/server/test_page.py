"""The page's files and the stream of the machine's state, without a browser."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
from tests.server.conftest import KEY, Running

from flashmoe.server.machine import _packed

HEADERS = {"Authorization": f"Bearer {KEY}"}


def states(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def test_files_need_no_key_and_allow_nothing_foreign(server: Running) -> None:
    page = httpx.get(server.url + "/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "http://" not in page.text
    assert "https://" not in page.text
    script = httpx.get(server.url + "/page/js/main.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    again = httpx.get(server.url + "/page/js/main.js", headers={"If-None-Match": script.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for path in ("/page/", "/page/js", "/page/../app.py", "/page/%2e%2e/app.py", "/page/none.js"):
        assert httpx.get(server.url + path).status_code in (401, 404), path


def test_the_state_needs_the_key(server: Running) -> None:
    assert httpx.get(server.url + "/v1/flashmoe/state").status_code == 401


def test_the_state_tells_what_happens_and_only_while_somebody_watches(server: Running) -> None:
    cache = server.service.llm.engine.cache
    with (
        httpx.Client(base_url=server.url, headers=HEADERS, timeout=30) as client,
        client.stream("GET", "/v1/flashmoe/state") as answer,
    ):
        events = states(answer)
        shape = next(events)
        assert (len(shape["layers"]), shape["experts"], shape["slots"]) == (30, 8, 240)
        assert shape["memory"]["budget"] == 2 << 30
        quiet = next(events)
        assert (quiet["type"], quiet["tokens"]) == ("state", 0)
        assert cache._activity is not None
        body = {"messages": [{"role": "user", "content": "Tell me of the sea."}], "max_tokens": 8}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        busy: list[dict[str, Any]] = []
        while sum(event["tokens"] for event in busy) < 8:
            busy.append(next(events))
        assert sum(event["hits"] + event["misses"] for event in busy) > 0
        for event in busy:
            assert (sum(event["layer_hits"]), sum(event["layer_misses"])) == (event["hits"], event["misses"])
        cells = [base64.b64decode(event["experts"]) for event in busy]
        assert all(len(one) == 120 for one in cells)
        assert any(byte & 0x66 for one in cells for byte in one)  # somebody was asked for
        assert any(byte & 0x11 for byte in cells[-1])  # somebody is in memory
    for _ in range(100):
        if cache._activity is None:
            return
        time.sleep(0.05)
    raise AssertionError("the cache is still being watched")


def test_half_a_byte_an_expert() -> None:
    rows = [bytearray([1, 2, 4]), bytearray([8, 15, 3])]
    assert base64.b64decode(_packed(rows)) == bytes([0x21, 0x84, 0x3F])
    assert base64.b64decode(_packed([bytearray([5])])) == bytes([5])
    assert _packed([]) == ""
