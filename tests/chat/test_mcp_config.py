"""Which MCP servers a file names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flashmoe.chat.mcp_config import McpServer, parse_command, read_config
from flashmoe.errors import ConfigError


def test_the_common_form(write_json: Callable[..., Path]) -> None:
    servers = {
        "files": {"command": "npx", "args": ["-y", "server"], "env": {"A": "b"}, "cwd": "/tmp"},
        "web": {"type": "http", "url": "https://example.org/mcp", "headers": {"Authorization": "Bearer x"}},
        "off": {"command": "x", "disabled": True},
        "plain": {"type": "stdio", "command": "server", "autoApprove": ["unknown fields are ignored"]},
    }
    assert read_config(write_json("mcp.json", {"mcpServers": servers, "other": 1})) == [
        McpServer("files", command="npx", args=("-y", "server"), env={"A": "b"}, cwd="/tmp"),
        McpServer("web", url="https://example.org/mcp", headers={"Authorization": "Bearer x"}),
        McpServer("plain", command="server"),
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "names no servers"),
        ({"mcpServers": []}, "names no servers"),
        ({"mcpServers": {"a": "ls"}}, "a is no object"),
        ({"mcpServers": {"a": {}}}, 'needs either "command" or "url"'),
        ({"mcpServers": {"a": {"command": 7}}}, 'needs either "command" or "url"'),
        ({"mcpServers": {"a": {"command": "x", "url": "http://x"}}}, 'needs either "command" or "url"'),
        ({"mcpServers": {"a": {"type": "sse", "url": "http://x"}}}, "type 'sse'"),
        ({"mcpServers": {"a": {"type": [], "url": "http://x"}}}, "type"),
        ({"mcpServers": {"a": {"url": "file:///etc/passwd"}}}, "must begin with http"),
        ({"mcpServers": {"a": {"command": "x", "args": "y"}}}, '"args"'),
        ({"mcpServers": {"a": {"command": "x", "args": [1]}}}, '"args"'),
        ({"mcpServers": {"a": {"command": "x", "env": {"A": 1}}}}, '"env"'),
        ({"mcpServers": {"a": {"command": "x", "cwd": 1}}}, '"cwd"'),
        ({"mcpServers": {"a": {"url": "http://x", "headers": []}}}, '"headers"'),
    ],
)
def test_what_is_wrong_is_named(write_json: Callable[..., Path], value: object, said: str) -> None:
    file = write_json("mcp.json", value)
    with pytest.raises(ConfigError, match=said) as error:
        read_config(file)
    assert str(file) in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        read_config(tmp_path / "bad.json")


def test_commands() -> None:
    assert parse_command("python 'my server.py' -v", "s") == McpServer(
        "s", command="python", args=("my server.py", "-v")
    )
    with pytest.raises(ConfigError, match="No closing quotation"):
        parse_command("python 'x", "s")
    with pytest.raises(ConfigError, match="needs a command"):
        parse_command(" ", "s")
