"""A server to be measured, and a client of its chat API that notes when each piece of an answer came.

Nothing but the standard library: the clients share the machine with the server and should cost next to nothing.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import urlsplit

from flashmoe.errors import ConfigError, FlashmoeError

_START_SECONDS = 600  # a large model's resident weights take a while
_STOP_SECONDS = 60
_PATIENCE_SECONDS = 600
_PREFIX = "flashmoe: error: "


class ServerError(FlashmoeError):
    """The server refused, broke off or cannot be reached."""


@dataclass(frozen=True)
class Answer:
    """A finished answer.  Seconds from the request on; tokens as the server counts them."""

    first_token_s: float
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    text: str


class Endpoint:
    """Where a server listens.  Thread-safe; every request has a connection of its own."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """url: like http://127.0.0.1:8080, a path in it is ignored.  Raises ConfigError for anything else."""
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ConfigError(f"cannot read the address {url!r}: write it like http://127.0.0.1:8080")
        self.host, self.port, self._key = parts.hostname, parts.port or 80, key

    def get(self, path: str) -> str:
        """A document.  Raises ServerError."""
        return Request(self, "GET", path).text()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """A JSON answer.  Raises ServerError."""
        return json.loads(Request(self, "POST", path, body).text())

    def metric(self, name: str) -> float:
        """A gauge of the server's metrics.  Raises ServerError when it has none of that name."""
        found = re.search(rf"^{name} (\S+)$", self.get("/metrics"), re.MULTILINE)
        if found is None:
            raise ServerError(f"{self.host}:{self.port} has no metric {name}: is it flashmoe's?")
        return float(found[1])

    @property
    def headers(self) -> dict[str, str]:
        """Those of every request."""
        key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return {"Content-Type": "application/json", "Connection": "close", **key}


class Request:
    """One request on its way.  cut() may be called from another thread."""

    def __init__(self, to: Endpoint, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        """Send it.  Raises ServerError."""
        self.pieces = 0
        self._began = time.monotonic()
        self._connection = http.client.HTTPConnection(to.host, to.port, timeout=_PATIENCE_SECONDS)
        try:
            self._connection.connect()
            self._socket: socket.socket = self._connection.sock  # a response takes it from its connection
            content = None if body is None else json.dumps(body).encode()
            self._connection.request(method, path, content, to.headers)
        except OSError as error:
            self._connection.close()
            raise ServerError(f"{to.host}:{to.port} cannot be reached ({error})") from None

    def cut(self) -> None:
        """Leave, whatever is still to come."""
        with suppress(OSError):  # it may have ended by itself
            self._socket.shutdown(socket.SHUT_RDWR)

    def text(self) -> str:
        """The whole answer.  Raises ServerError."""
        try:
            return self._response().read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"the connection broke ({error!r})") from None
        finally:
            self._connection.close()

    def answer(self) -> Answer:
        """A streamed chat answer; `pieces` counts those that have come.  Raises ServerError."""
        first, text, usage = None, "", None
        try:
            for event in self._events():
                for choice in event.get("choices", ()):
                    delta = choice["delta"]
                    piece = delta.get("content") or delta.get("reasoning_content") or ""
                    text += delta.get("content") or ""
                    if piece:
                        first = first or time.monotonic() - self._began
                        self.pieces += 1
                usage = event.get("usage") or usage
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"the stream broke after {self.pieces} pieces ({error!r})") from None
        finally:
            self._connection.close()
        if usage is None:
            raise ServerError(f"the stream ended early after {self.pieces} pieces")
        seconds = time.monotonic() - self._began
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        counts = usage["prompt_tokens"], cached, usage["completion_tokens"]
        return Answer(first or seconds, seconds, *counts, text)

    def _events(self) -> Iterator[dict[str, Any]]:
        response = self._response()
        while line := response.readline():
            if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                event = json.loads(line[6:])
                if "error" in event:
                    raise ServerError(event["error"]["message"])
                yield event

    def _response(self) -> http.client.HTTPResponse:
        response = self._connection.getresponse()
        if response.status != 200:
            raise ServerError(f"status {response.status}: {response.read(1000).decode('utf-8', 'replace')}")
        return response


@contextmanager
def started(bundle: str, options: Sequence[str]) -> Iterator[str]:
    """The address of a server of that bundle, in a process of its own; it ends with the block, in an orderly way.

    Raises FlashmoeError with the line that the server ended with.
    """
    command = [sys.executable, "-m", "flashmoe.cli", "serve", bundle, "--port", "0", *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            yield _address(process, log)
            process.terminate()
            code = process.wait(_STOP_SECONDS)
            if code != 0:
                raise ServerError(f"the server ended with code {code}: {_last_line(log)}")
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: IO[str]) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        log.seek(0)
        found = re.search(r" at (http://\S+)/v1,", log.read())
        if found:
            return found[1]
        if process.poll() is not None:
            raise FlashmoeError(_last_line(log).removeprefix(_PREFIX))
        time.sleep(0.05)
    raise ServerError(f"the server did not start within {_START_SECONDS} s")


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    return ([line.strip() for line in log if line.strip()] or ["it said nothing"])[-1]
