"""The shell tool with real commands."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from flashmoe.chat.shell_tool import Approval, ShellTool
from flashmoe.errors import ToolError


class User:
    """Says what is in its script."""

    def __init__(self, *answers: Approval) -> None:
        self.answers, self.asked = list(answers), []

    def __call__(self, command: str) -> Approval:
        self.asked.append(command)
        return self.answers.pop(0)


def shell(directory: Path, user: User, timeout: float = 20, most: int = 4000) -> ShellTool:
    return ShellTool(user, directory, timeout, most)


def run(directory: Path, command: str, timeout: float = 20, most: int = 4000) -> str:
    return shell(directory, User(Approval.YES), timeout, most).call("shell", {"command": command})


def test_output_and_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    assert run(tmp_path, "cat file; pwd; echo oops >&2; exit 3") == f"exit code 3\ncontent{tmp_path}\noops\n"
    assert run(tmp_path, "cat") == "exit code 0\n"  # nothing to read: no waiting
    assert run(tmp_path, "kill -9 $$") == "exit code -9\n"


def test_nothing_runs_without_consent(tmp_path: Path) -> None:
    user = User(Approval.NO, Approval.YES, Approval.NO)
    tool = shell(tmp_path, user)
    with pytest.raises(ToolError, match="the user does not want"):
        tool.call("shell", {"command": "touch no"})
    tool.call("shell", {"command": "touch yes"})
    with pytest.raises(ToolError):
        tool.call("shell", {"command": "touch yes"})  # yes is for once
    assert user.asked == ["touch no", "touch yes", "touch yes"]
    assert [path.name for path in tmp_path.iterdir()] == ["yes"]


def test_always_is_for_exactly_this_command(tmp_path: Path) -> None:
    user = User(Approval.ALWAYS, Approval.NO)
    tool = shell(tmp_path, user)
    for _ in range(3):
        tool.call("shell", {"command": "echo 1"})
    with pytest.raises(ToolError):
        tool.call("shell", {"command": "echo 1 "})
    assert user.asked == ["echo 1", "echo 1 "]


@pytest.mark.parametrize(
    "arguments", [{}, {"command": 7}, {"command": " "}, {"command": "a\0b"}, {"cmd": "ls"}]
)
def test_what_is_no_command_is_not_even_asked(tmp_path: Path, arguments: dict[str, object]) -> None:
    user = User()
    with pytest.raises(ToolError, match="give the command as text"):
        shell(tmp_path, user).call("shell", arguments)
    assert user.asked == []


def test_long_output_keeps_both_ends(tmp_path: Path) -> None:
    text = run(tmp_path, "echo first; yes | head -c 3000000; echo last", most=1000)
    assert text.startswith("exit code 0\nfirst\n")
    assert text.endswith("last\n")
    assert "bytes left out" in text
    assert len(text) < 1100


def test_endless_output_ends_with_the_timeout_in_little_memory(tmp_path: Path) -> None:
    text = run(tmp_path, "yes", timeout=0.5, most=1000)
    assert text.startswith("stopped: it took longer than 0.5 seconds\ny\n")
    assert len(text) < 1200


def test_a_command_that_takes_too_long_leaves_nothing_behind(tmp_path: Path) -> None:
    text = run(tmp_path, "sleep 60 & echo $!; sleep 60", timeout=1)
    assert text.startswith("stopped")
    child = int(text.splitlines()[1])
    assert _gone(child)


def test_what_stays_in_the_background_is_not_waited_for_and_ends(tmp_path: Path) -> None:
    text = run(tmp_path, "sleep 60 & echo $!", timeout=30)
    assert text.startswith("exit code 0\n")
    assert _gone(int(text.splitlines()[1]))


def test_closing_the_output_is_not_the_end(tmp_path: Path) -> None:
    assert run(tmp_path, "exec >&- 2>&-; sleep 0.3; exit 5") == "exit code 5\n"
    assert run(tmp_path, "exec >&- 2>&-; sleep 60", timeout=0.5).startswith("stopped")


def test_an_interruption_ends_the_command(tmp_path: Path) -> None:
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.7, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "echo $$ > pid; sleep 60")
    timer.join()
    assert _gone(int((tmp_path / "pid").read_text()))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    assert run(tmp_path, r"printf '\377\303\251'") == "exit code 0\n\ufffdé"


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="cannot be started"):
        run(tmp_path / "none", "ls")


def test_the_definition_names_the_directory(tmp_path: Path) -> None:
    (tool,) = shell(tmp_path, User()).tools
    assert str(tmp_path) in tool["function"]["description"]


def _gone(process: int) -> bool:
    """Whether a process ends soon; one that nobody has waited for is a zombie."""
    for _ in range(100):
        try:
            os.kill(process, 0)
            if Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False
