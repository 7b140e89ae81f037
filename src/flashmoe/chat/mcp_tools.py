"""Tools of MCP servers (Model Context Protocol); the only module that knows the `mcp` package.

An event loop on a thread of its own keeps the connections; callers are ordinary code and wait.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

import httpx2
from mcp import Client, MCPError, StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, Tool

from flashmoe.chat.mcp_config import McpServer
from flashmoe.errors import ConfigError, ToolError

T = TypeVar("T")

_START_SECONDS = 60.0  # a server that its package manager downloads first
_STOP_SECONDS = 10.0
_GRACE_SECONDS = 5.0  # the server's own timeout comes first
_MOST_PAGES = 100
_LAST_BYTES = 4096


@dataclass
class _Connection:
    """errors: what a server's process writes to its standard error."""

    server: McpServer
    errors: TextIO
    client: Client | None = None
    tools: Sequence[Tool] = ()


class McpTools:
    """A Toolbox.  Used by one thread; a context manager: close() ends the servers that it started."""

    def __init__(self, servers: Sequence[McpServer], timeout: float) -> None:
        """Connect to all.  timeout: seconds that a call may take.  Raises ConfigError when a server does not answer."""
        self._timeout = timeout
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True)
        self._thread.start()
        self._stop = asyncio.Event()
        self._homes: list[Future[None]] = []
        self._files = ExitStack()
        self._owners: dict[str, tuple[_Connection, str]] = {}
        self.tools: list[dict[str, Any]] = []
        try:
            self._register([self._connect(server) for server in servers])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> McpTools:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections; harmless when repeated."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        for home in self._homes:
            with suppress(Exception):  # it is going away, whatever it has to say
                home.result(_STOP_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._files.close()

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Have a server carry out a call.  Raises ToolError."""
        connection, own_name = self._owners[name]
        assert connection.client is not None
        result = self._wait(
            connection.client.call_tool(own_name, arguments, read_timeout_seconds=self._timeout),
            f"the MCP server {connection.server.name!r}",
            self._timeout + _GRACE_SECONDS,
        )
        text = _text_of(result)
        if result.is_error:
            raise ToolError(text or "the tool failed and does not say why")
        return text

    def _connect(self, server: McpServer) -> _Connection:
        written = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - close() does
        errors = self._files.enter_context(written)
        connection = _Connection(server, errors)
        ready: Future[None] = Future()
        home = asyncio.run_coroutine_threadsafe(self._live(connection, ready), self._loop)
        self._homes.append(home)
        try:
            ready.result(_START_SECONDS)
        except TimeoutError as error:
            raise ConfigError(
                f"the MCP server {server.name!r} has not answered in {_START_SECONDS:g} s{_last_words(connection)}"
            ) from error
        return connection

    async def _live(self, connection: _Connection, ready: Future[None]) -> None:
        """The life of a connection: one task, because its scopes belong to the task that opened them."""
        try:
            async with _client(connection) as client:
                connection.client, connection.tools = client, await _list_tools(client)
                ready.set_result(None)
                await self._stop.wait()
        except Exception as error:  # noqa: BLE001 - whatever a server does wrong is told in one line
            if not ready.done():
                told = f"{_reason(error)}{_last_words(connection)}"
                message = f"the MCP server {connection.server.name!r} does not work: {told}"
                ready.set_exception(ConfigError(message))

    def _register(self, connections: Sequence[_Connection]) -> None:
        """Tools by their names; those that several servers have are called SERVER__NAME."""
        count = Counter(_plain(tool.name) for connection in connections for tool in connection.tools)
        for connection in connections:
            for tool in connection.tools:
                name = _plain(tool.name)
                if count[name] > 1:
                    name = f"{_plain(connection.server.name)}__{name}"
                self._owners[name] = connection, tool.name
                function = {
                    "name": name,
                    "description": tool.description or "",
                    "parameters": tool.input_schema,
                }
                self.tools.append({"type": "function", "function": function})

    def _wait(self, work: Coroutine[Any, Any, T], who: str, seconds: float) -> T:
        """Raises ToolError; an interruption cancels the work."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except TimeoutError as error:
            raise ToolError(f"{who} has not answered in {self._timeout:g} s") from error
        except Exception as error:  # servers and the protocol fail in many ways; the model is told
            raise ToolError(f"{who} failed: {_reason(error)}") from error
        finally:
            future.cancel()


@asynccontextmanager
async def _client(connection: _Connection) -> AsyncIterator[Client]:
    server = connection.server
    if server.url is not None:
        timeout = httpx2.Timeout(30.0, read=300.0)
        async with (
            httpx2.AsyncClient(headers=dict(server.headers), timeout=timeout) as http,
            Client(streamable_http_client(server.url, http_client=http)) as client,
        ):
            yield client
    else:
        assert server.command is not None
        parameters = StdioServerParameters(
            command=server.command, args=list(server.args), env=dict(server.env), cwd=server.cwd
        )
        async with Client(stdio_client(parameters, errlog=connection.errors)) as client:
            yield client


async def _list_tools(client: Client) -> list[Tool]:
    tools: list[Tool] = []
    if client.server_capabilities.tools is None:
        return tools
    cursor: str | None = None
    for _ in range(_MOST_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            break
    return tools


def _text_of(result: CallToolResult) -> str:
    """What of a result can be read as text; the rest is named."""
    parts = []
    for part in result.content:
        resource = getattr(part, "resource", None)
        text = getattr(part, "text", None) if resource is None else getattr(resource, "text", None)
        parts.append(text if isinstance(text, str) else f"[{part.type}: only text can be shown]")
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _plain(name: str) -> str:
    """A name that every dialect can write."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def _reason(error: BaseException) -> str:
    """The first real cause in one line; task groups wrap them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = str(error) if not isinstance(error, MCPError) else error.error.message
    return text or type(error).__name__


def _last_words(connection: _Connection) -> str:
    """The last line that the server wrote to its standard error."""
    connection.errors.flush()
    size = connection.errors.seek(0, 2)
    connection.errors.seek(max(0, size - _LAST_BYTES))
    lines = [line.strip() for line in connection.errors.read().splitlines() if line.strip()]
    return f" ({lines[-1]})" if lines else ""
