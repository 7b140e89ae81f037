"""Damaged and hostile files of `flashmoe chat`: conversations, and lists of MCP servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.test_fuzz import Contained, budget, changed

from flashmoe.chat.mcp_config import McpServer, read_config
from flashmoe.chat.template import ChatTemplate
from flashmoe.chat.transcript import Transcript

CALL = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "Oslo"}'}}
TALK = {
    "model": "demo",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What time is it?"}]},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "A clock would know.",
            "tool_calls": [CALL],
        },
        {"role": "tool", "tool_call_id": "call_1", "name": "clock", "content": "noon"},
        {"role": "assistant", "content": "Noon."},
    ],
}
SERVERS = {
    "mcpServers": {
        "files": {"command": "server", "args": ["-v"], "env": {"A": "b"}, "cwd": "/tmp"},
        "web": {"type": "http", "url": "https://example.org/mcp", "headers": {"X": "y"}},
        "off": {"command": "x", "disabled": True},
    }
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def template(demo_bundle: Path) -> ChatTemplate:
    return ChatTemplate.from_dir(demo_bundle)


@budget(150)
@given(data=st.data())
def test_conversation(
    folder: Path, template: ChatTemplate, contained: Contained, data: st.DataObject
) -> None:
    file, copy = folder / "talk.json", folder / "copy.json"
    file.write_bytes(data.draw(changed(json.dumps(TALK).encode())))
    copy.unlink(missing_ok=True)
    loaded: list[Transcript] = []
    if contained(folder, lambda: loaded.append(Transcript.load(file))):
        assert not loaded
        return
    (transcript,) = loaded
    contained(folder, lambda: use(transcript, template))
    transcript.save(copy, "demo")
    assert json.dumps(Transcript.load(copy).messages) == json.dumps(transcript.messages)


@budget(150)
@given(data=st.data())
def test_list_of_servers(folder: Path, contained: Contained, data: st.DataObject) -> None:
    file = folder / "mcp.json"
    file.write_bytes(data.draw(changed(json.dumps(SERVERS).encode())))
    contained(folder, lambda: check(read_config(file)))


def use(transcript: Transcript, template: ChatTemplate) -> None:
    """What a chat does with a conversation."""
    template.render(transcript.messages)
    assert isinstance(transcript.system, str | None)


def check(servers: list[McpServer]) -> None:
    """What is started or called is text, and one of both."""
    for server in servers:
        assert (server.command is None) != (server.url is None)
        texts: list[Any] = [server.command or server.url, *server.args, *server.env.values()]
        assert all(isinstance(text, str) for text in [*texts, *server.headers.values()])
