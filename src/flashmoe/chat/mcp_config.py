"""Which MCP servers to use: command lines, and files like {"mcpServers": {NAME: {"command": ..., "args": [...]}}}."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashmoe.chat.json_file import read_json_file
from flashmoe.errors import ConfigError

_LARGEST_FILE = 1 << 20
_HTTP = ("http", "streamable-http", "streamableHttp", "streamable_http")


@dataclass(frozen=True)
class McpServer:
    """A program that speaks MCP on its standard input and output, or the address of a server (streamable HTTP).

    env is added to the few variables that such a program inherits (PATH, HOME, ...).
    """

    name: str
    command: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def read_config(path: Path) -> list[McpServer]:
    """The servers of a file, without those that it disables.  Raises ConfigError, with one line that names it."""
    value = read_json_file(path, _LARGEST_FILE, ConfigError)
    servers = value.get("mcpServers") if isinstance(value, dict) else None
    if not isinstance(servers, dict):
        raise ConfigError(
            f'{path} names no servers: write {{"mcpServers": {{"name": {{"command": "..."}}}}}}'
        )
    found = [_server(f"{path}: {name}", name, entry) for name, entry in servers.items()]
    return [server for server in found if server is not None]


def parse_command(text: str, name: str) -> McpServer:
    """A server that a command line starts.  Raises ConfigError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"the MCP server {text!r} is no command line: {error}") from error
    if not words:
        raise ConfigError("an MCP server needs a command: --mcp-server 'python server.py'")
    return McpServer(name, command=words[0], args=tuple(words[1:]))


def _server(where: str, name: str, entry: Any) -> McpServer | None:
    if not isinstance(entry, dict):
        raise ConfigError(f'{where} is no object: write {{"command": "..."}} or {{"url": "..."}}')
    if entry.get("disabled") is True:
        return None
    kind, url, command = entry.get("type"), entry.get("url"), entry.get("command")
    if kind not in (None, "stdio", *_HTTP):
        raise ConfigError(f"{where} has the type {kind!r}: only stdio and streamable HTTP are supported")
    if isinstance(url, str) and command is None and kind != "stdio":
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{where} has the url {url!r}: it must begin with http:// or https://")
        return McpServer(name, url=url, headers=_texts(where, entry, "headers"))
    if not isinstance(command, str) or not command or url is not None:
        raise ConfigError(f'{where} needs either "command" or "url", as text')
    args, cwd = entry.get("args", []), entry.get("cwd")
    if not isinstance(args, list) or not all(isinstance(arg, str) for arg in args):
        raise ConfigError(f'{where} has "args" that are no list of texts')
    if not isinstance(cwd, str | None):
        raise ConfigError(f'{where} has a "cwd" that is no text')
    return McpServer(name, command=command, args=tuple(args), env=_texts(where, entry, "env"), cwd=cwd)


def _texts(where: str, entry: dict[str, Any], key: str) -> dict[str, str]:
    value = entry.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ConfigError(f'{where} has "{key}" that is no object of texts')
    return value
