"""`flashmoe serve` as a process: how it starts, what it refuses, and how it ends under load."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from flashmoe.cli import main

CHAT: Any = {"messages": [{"role": "user", "content": "Tell me of the sea."}], "temperature": 0.0}


@contextmanager
def serving(bundle: Path, *words: str, env: dict[str, str] | None = None) -> Iterator[tuple[Any, str]]:
    command = [
        sys.executable,
        "-m",
        "flashmoe.cli",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--memory",
        "700MiB",
    ]
    process = subprocess.Popen(
        [*command, "--context", "2048", *words], stderr=subprocess.PIPE, text=True, env=env
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"at (http://[^/]+)/v1", line)
        assert found, line
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_running_answers_finish_after_sigterm(demo_bundle: Path) -> None:
    with serving(demo_bundle) as (process, url):
        answers: list[Any] = []

        def ask() -> None:
            answers.append(
                httpx.post(url + "/v1/chat/completions", json=CHAT | {"max_tokens": 150}, timeout=60)
            )

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        while httpx.get(url + "/health").json()["running"] < 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {150}
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


STREAMS: Any = {
    "/v1/chat/completions": (CHAT | {"max_tokens": 60}, "data: [DONE]"),
    "/v1/responses": ({"input": "Tell me of the sea.", "max_output_tokens": 60}, "event: response."),
    "/v1/messages": (CHAT | {"max_tokens": 60}, "event: message_stop"),
}


def test_streams_and_those_who_wait_finish_too(demo_bundle: Path) -> None:
    """Twelve clients of three APIs on two places."""
    accepted = threading.Barrier(12 + 1)
    with serving(demo_bundle, "--parallel", "2") as (process, url):

        def ask(path: str) -> tuple[str, list[str]]:
            given = STREAMS[path][0] | {"stream": True}
            with httpx.stream("POST", url + path, json=given, timeout=60) as answer:
                accepted.wait(60)  # a stream begins when its request is accepted
                assert answer.status_code == 200
                return path, [line for line in answer.iter_lines() if line]

        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(ask, path) for path in list(STREAMS) * 4]
            accepted.wait(60)
            state = httpx.get(url + "/health").json()
            assert (state["running"], state["waiting"] > 0) == (2, True)
            process.send_signal(signal.SIGTERM)
            for path, lines in [answer.result() for answer in answers]:
                end = [line for line in lines if line.startswith(STREAMS[path][1])]
                assert end[-1] in ("data: [DONE]", "event: message_stop", "event: response.incomplete"), path
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_whoever_watches_the_machine_does_not_delay_the_end(demo_bundle: Path) -> None:
    with serving(demo_bundle) as (process, url), httpx.stream("GET", url + "/v1/flashmoe/state") as watcher:
        lines = watcher.iter_lines()
        assert next(lines) == "event: shape"
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line.startswith("event: ")][:1] in ([], ["event: state"])
        # The stream has ended by itself: being cut after --drain (30 s) would raise above, and last longer.
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_what_takes_too_long_is_cut(demo_bundle: Path) -> None:
    with (
        serving(demo_bundle, "--drain", "0") as (process, url),
        httpx.stream(
            "POST",
            url + "/v1/chat/completions",
            json=CHAT | {"max_tokens": 1900, "stream": True},
            timeout=60,
        ) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        last = [line for line in lines if line][-1]
        assert "the server is shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert process.wait(20) == 0
        assert time.monotonic() - began < 15


def test_the_prefix_cache_survives_a_restart_of_the_same_bundle_only(
    demo_bundle: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(demo_bundle, changed, copy_function=os.symlink)
    text = (changed / "manifest.json").read_bytes()
    (changed / "manifest.json").unlink()
    (changed / "manifest.json").write_bytes(text + b"\n")
    messages = [{"role": "user", "content": "Tell me of the sea, slowly and in many words. " * 20}]
    cached = []
    for bundle, options in (
        (demo_bundle, ()),
        (demo_bundle, ()),
        (changed, ()),
        (demo_bundle, ("--kv-cache", "int8")),
    ):
        with serving(bundle, "--cache-dir", str(tmp_path / "cache"), *options) as (process, url):
            given = CHAT | {"messages": messages, "max_tokens": 3}
            usage = httpx.post(url + "/v1/chat/completions", json=given, timeout=60).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    assert cached[1] > 100
    assert (cached[0], *cached[2:]) == (0, 0, 0)


def test_the_key_may_come_from_the_environment(demo_bundle: Path) -> None:
    import os

    with serving(demo_bundle, env={**os.environ, "FLASHMOE_API_KEY": "k"}) as (_, url):
        assert httpx.get(url + "/v1/models").status_code == 401
        assert httpx.get(url + "/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "203.0.113.7"], "cannot listen on 203.0.113.7"),
        (["--parallel", "99"], "--parallel must be between 1 and 16"),
        (["--memory", "10MiB"], "the smallest that works is --memory"),
        (["/nowhere"], "not a flashmoe bundle"),
    ],
)
def test_what_cannot_be_served(
    capsys: pytest.CaptureFixture[str], demo_bundle: Path, words: list[str], message: str
) -> None:
    given = words if words[0].startswith("/") else [str(demo_bundle), *words]
    memory = [] if "--memory" in words else ["--memory", "3GiB"]
    assert main(["serve", *given, *memory, "--context", "512"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("flashmoe: error: ")
    assert error.count("\n") == 1


def test_a_port_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "99999"]) == 2
    assert "'99999' is no port" in capsys.readouterr().err
