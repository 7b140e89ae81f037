"""A tool that runs shell commands, each only when the user has agreed to it."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from flashmoe.errors import ToolError

_TICK_SECONDS = 0.1
_PIECE = 1 << 16


class Approval(Enum):
    """What the user says to a command; ALWAYS is for exactly this command, until the program ends."""

    YES = "yes"
    NO = "no"
    ALWAYS = "always"


class ShellTool:
    """A Toolbox with the one tool "shell".

    Each command runs in a shell of its own, in a process group of its own which ends with it; it reads nothing, and
    what it writes is cut to `most` bytes while it runs.
    """

    def __init__(
        self, approve: Callable[[str], Approval], directory: Path, timeout: float, most: int
    ) -> None:
        """approve: asks the user.  directory: where commands run.  timeout: seconds that one may take."""
        self._approve, self._directory, self._timeout, self._most = approve, directory, timeout, most
        self._approved: set[str] = set()
        parameters = {
            "type": "object",
            "properties": {"command": {"type": "string", "description": "for /bin/sh -c"}},
            "required": ["command"],
            "additionalProperties": False,
        }
        text = (
            f"Run a shell command in {directory} and return its output and exit code. The user is asked before each "
            f"one. It has no input, takes at most {timeout:g} seconds, and nothing stays from one command to the next "
            "but files."
        )
        function = {"name": "shell", "description": text, "parameters": parameters}
        self.tools = [{"type": "function", "function": function}]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Run the command, if the user agrees.  Raises ToolError."""
        command = arguments.get("command")
        if not isinstance(command, str) or not command.strip() or "\0" in command:
            raise ToolError('give the command as text: {"command": "ls -l"}')
        if command not in self._approved:
            said = self._approve(command)
            if said is Approval.NO:
                raise ToolError("the user does not want this command to run")
            if said is Approval.ALWAYS:
                self._approved.add(command)
        return self._run(command)

    def _run(self, command: str) -> str:
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env={**os.environ, "TERM": "dumb", "NO_COLOR": "1", "PAGER": "cat"},
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise ToolError(f"the command cannot be started: {error}") from error
        output = _Output(self._most)
        try:
            ended = _collect(process, output, time.monotonic() + self._timeout)
        finally:  # also when the user interrupts
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        if not ended:
            return f"stopped: it took longer than {self._timeout:g} seconds\n{output.text()}"
        return f"exit code {process.returncode}\n{output.text()}"


class _Output:
    """The beginning and the end of what is written, in bounded memory."""

    def __init__(self, most: int) -> None:
        self._head, self._tail = bytearray(), deque[bytes]()
        self._most_head, self._most_tail = most - most // 2, most // 2
        self._tail_nbytes = self._lost = 0

    def add(self, piece: bytes) -> None:
        """The next bytes."""
        room = self._most_head - len(self._head)
        self._head += piece[:room]
        if rest := piece[room:]:
            self._tail.append(rest)
            self._tail_nbytes += len(rest)
        while self._tail and self._tail_nbytes - len(self._tail[0]) >= self._most_tail:
            gone = self._tail.popleft()
            self._tail_nbytes -= len(gone)
            self._lost += len(gone)

    def text(self) -> str:
        """As UTF-8, with a note of what was left out."""
        tail = b"".join(self._tail)
        lost = self._lost + max(0, len(tail) - self._most_tail)
        tail = tail[max(0, len(tail) - self._most_tail) :]
        note = f"\n[... {lost} bytes left out ...]\n".encode() if lost else b""
        return (bytes(self._head) + note + tail).decode("utf-8", "replace")


def _collect(process: subprocess.Popen[bytes], output: _Output, deadline: float) -> bool:
    """Read until the command has ended; False when it was still at work at the deadline.

    What it has left in the background may hold the pipe open: it is not waited for.
    """
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            ended = process.poll() is not None
            if selector.select(0 if ended else _TICK_SECONDS):
                piece = os.read(descriptor, _PIECE)
                if not piece:
                    return _ends(process, deadline)
                output.add(piece)
            elif ended:
                return True
    return False


def _ends(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Wait for a command that has closed its output."""
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True
