"""Real MCP servers in processes of their own: on pipes and over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashmoe.chat.mcp_config import McpServer
from flashmoe.chat.mcp_tools import McpTools
from flashmoe.errors import ConfigError, ToolError

SERVER = str(Path(__file__).with_name("tool_server.py"))
STDIO = McpServer("calc", command=sys.executable, args=(SERVER,), env={"COLOUR": "blue"})


@pytest.fixture(scope="module")
def tools() -> Iterator[McpTools]:
    with McpTools([STDIO], timeout=20) as opened:
        yield opened


def test_tools_have_their_schemas(tools: McpTools) -> None:
    named = {tool["function"]["name"]: tool["function"] for tool in tools.tools}
    assert set(named) == {"add", "fail", "wait", "die", "setting"}
    assert named["add"]["description"] == "Add two numbers."
    assert named["add"]["parameters"]["properties"]["a"]["type"] == "integer"
    assert named["add"]["parameters"]["required"] == ["a", "b"]


def test_a_call(tools: McpTools) -> None:
    assert tools.call("add", {"a": 2, "b": 3}) == "5"
    assert tools.call("setting", {"name": "COLOUR"}) == "blue"


def test_failures_say_why(tools: McpTools) -> None:
    with pytest.raises(ToolError, match="because of the weather"):
        tools.call("fail", {"reason": "because of the weather"})
    with pytest.raises(ToolError, match="b"):
        tools.call("add", {"a": 2})
    assert tools.call("add", {"a": 1, "b": 1}) == "2"


def test_a_slow_tool_is_not_waited_for() -> None:
    with McpTools([STDIO], timeout=0.5) as tools, pytest.raises(ToolError, match="calc"):
        tools.call("wait", {"seconds": 30})


def test_an_interruption_ends_the_waiting(tools: McpTools) -> None:
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        tools.call("wait", {"seconds": 5})
    timer.join()
    assert time.monotonic() - began < 4


def test_a_server_that_dies_fails_its_calls_only() -> None:
    with McpTools([STDIO], timeout=20) as tools:
        with pytest.raises(ToolError, match="the MCP server 'calc' failed"):
            tools.call("die", {})
        with pytest.raises(ToolError, match="'calc'"):
            tools.call("add", {"a": 1, "b": 1})


def test_servers_with_the_same_tools_lend_them_their_names() -> None:
    other = McpServer("my calc", command=sys.executable, args=(SERVER,))
    with McpTools([STDIO, other], timeout=20) as tools:
        names = [tool["function"]["name"] for tool in tools.tools]
        assert names[0] == "calc__add"
        assert "my_calc__add" in names
        assert tools.call("my_calc__add", {"a": 2, "b": 2}) == "4"
        assert tools.call("calc__setting", {"name": "COLOUR"}) == "blue"
        assert tools.call("my_calc__setting", {"name": "COLOUR"}) == ""


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (McpServer("gone", command="/nowhere/server"), "'gone' does not work: .*No such file"),
        (McpServer("deaf", command="sh", args=("-c", "echo 'no such module' >&2; exit 1")), "no such module"),
        (McpServer("odd", command="sh", args=("-c", "echo hello; exit 0")), "'odd' does not work"),
        (McpServer("shut", url="http://127.0.0.1:9/mcp"), "'shut' does not work"),
    ],
)
def test_a_server_that_does_not_start_is_one_line(server: McpServer, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        McpTools([server], timeout=20)
    assert "\n" not in str(error.value)


def test_servers_end_with_us(tmp_path: Path) -> None:
    script = f"echo $$ > {tmp_path}/pid; exec {sys.executable} {SERVER}"
    with McpTools([McpServer("calc", command="sh", args=("-c", script))], timeout=20):
        process = int((tmp_path / "pid").read_text())
        os.kill(process, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_over_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, SERVER, "http", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(port)
        server = McpServer("web", url=f"http://127.0.0.1:{port}/mcp", headers={"X-Key": "1"})
        with McpTools([server], timeout=20) as tools:
            assert tools.call("add", {"a": 20, "b": 22}) == "42"
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int) -> None:
    for _ in range(400):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("the server did not start")
