"""`flashmoe chat` as a part of a pipe, with the demo model."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmoe.cli import main

CHAT = (
    "chat",
    "--temperature",
    "0",
    "--max-tokens",
    "12",
    "--context",
    "512",
    "--memory",
    "1GiB",
    "--usage-file",
    "off",
)
TOOLS = Path(__file__).parents[1] / "chat" / "tool_server.py"


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(text: str, *words: object) -> int:
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape")))
        )
        return main([*CHAT, *map(str, words)])

    return run


def test_a_line_a_prompt_and_plain_answers(
    pipe: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    assert pipe(f"/system Be kind.\nHello there\n\n  And then?  \n/save {file}\n") == 0
    out, err = capsys.readouterr()
    messages = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "And then?"
    assert out == messages[2]["content"] + "\n" + messages[4]["content"] + "\n"
    assert "5 messages saved" in err
    assert "\x1b" not in out + err


def test_a_saved_conversation_goes_on(
    pipe: Callable[..., int], capsys: pytest.CaptureFixture[str], write_json: Callable[..., Path]
) -> None:
    file = write_json(
        "talk.json", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    )
    assert pipe("Tell me more\n/stats\n", "--load", file) == 0
    assert "messages           4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/nonsense\n", "unknown command /nonsense"),
        ("/load /nowhere\n", "/nowhere cannot be read"),
        ("word " * 2000 + "\n", "the context holds 512"),
        ("caf\udce9\n", "is no utf-8 text"),
    ],
)
def test_the_first_error_ends_it(
    pipe: Callable[..., int], capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    assert pipe(text + "Hello\n") == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("flashmoe: error: ")
    assert said in err


def test_wrong_options(pipe: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert pipe("", "--shell") == 2
    assert "needs a terminal" in capsys.readouterr().err
    assert pipe("", "--temperature", "1000") == 1
    assert "temperature must lie in" in capsys.readouterr().err
    assert pipe("", "--load", tmp_path / "none.json") == 1
    assert "none.json cannot be read" in capsys.readouterr().err
    assert pipe("", "--mcp", tmp_path / "none.json") == 1
    assert "none.json cannot be read" in capsys.readouterr().err
    assert pipe("", "--mcp-server", "/nowhere/server") == 1
    assert "server1" in capsys.readouterr().err


def test_reasoning_is_apart(pipe: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert pipe("Hello\n", "--thinking", "on", "--reasoning", "show") == 0
    out, err = capsys.readouterr()
    assert err.strip()  # the toy model only thinks within so few tokens
    assert out.strip() == ""
    assert pipe("Hello\n", "--thinking", "on") == 0
    assert capsys.readouterr().err == ""


def test_a_forced_call_of_a_real_server(pipe: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    server = f"{sys.executable} {TOOLS}"
    talk = "/tools\n/use add\nHow much is 2 and 3?\n/show\n"
    assert pipe(talk, "--mcp-server", server, "--max-tokens", "120", "--context", "2048", "--seed", "1") == 0
    err = capsys.readouterr().err
    assert "add(a, b)  Add two numbers." in err
    call = next(line for line in err.splitlines() if line.startswith("tool: add "))
    arguments = json.loads(call.removeprefix("tool: add "))
    assert f"tool: {arguments['a'] + arguments['b']}" in err  # of /show: the result is in the conversation


def test_ctrl_c_ends_a_pipe() -> None:
    command = [sys.executable, "-m", "flashmoe.cli", *CHAT, "--max-tokens", "2000", "--context", "4096"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Write a very long story.\n")
        process.stdin.flush()
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.decode().endswith("flashmoe: interrupted\n")
