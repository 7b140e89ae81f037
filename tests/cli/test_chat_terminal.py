"""`flashmoe chat` in a pseudo-terminal, with the demo model: what a user types and sees."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest

pytest.importorskip("prompt_toolkit")

_SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[()=>].?|[78])")
ENTER, CTRL_C, CTRL_D, NEWLINE = "\r", "\x03", "\x04", "\x1b\r"


class Terminal:
    """The program, and all that it has written."""

    def __init__(self, home: Path, *words: str, columns: int = 80) -> None:
        master, slave = pty.openpty()
        ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = {**os.environ, "XDG_STATE_HOME": str(home), "TERM": "xterm-256color"}
        command = [sys.executable, "-m", "flashmoe.cli", "chat", "--memory", "1GiB", "--context", "2048"]
        self.process = subprocess.Popen(
            [*command, "--usage-file", "off", "--temperature", "0", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            cwd=home,
            start_new_session=True,
            preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._master, self.raw = master, ""
        self._seen = 0
        self.wait_for("Ctrl-D leaves.")

    @property
    def text(self) -> str:
        """What was written, without its control sequences."""
        return _SEQUENCE.sub("", self.raw)

    def type(self, text: str) -> None:
        """Keys; only later output counts for wait_for()."""
        self._read(0.05)
        self._seen = len(self.text)
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """What the pattern matches in what was written since type()."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.text[self._seen :], re.DOTALL):
                return found[0]
            if not self._read(0.1) and self.process.poll() is not None:
                break
        raise AssertionError(f"{pattern!r} is not in {self.text[self._seen :]!r}")

    def leave(self) -> int:
        """Ctrl-D, and the exit code."""
        self.type(CTRL_D)
        while self._read(5):
            pass
        return self.process.wait(30)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._master)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        try:
            piece = os.read(self._master, 1 << 16)
        except OSError:  # Linux: nobody has the other end any more
            return False
        self.raw += piece.decode("utf-8", "replace")
        if "\x1b[6n" in piece.decode("latin-1"):  # prompt_toolkit asks where the cursor is
            os.write(self._master, b"\x1b[1;1R")
        return bool(piece)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def terminal(home: Path) -> Iterator[Terminal]:
    opened = Terminal(home)
    yield opened
    opened.close()


def test_a_conversation(terminal: Terminal, home: Path) -> None:
    terminal.type("/set max_tokens 12" + ENTER)
    terminal.wait_for("max_tokens 12")
    terminal.type("Hello there" + ENTER)
    terminal.wait_for("cut: --max-tokens is reached")
    terminal.type("/nonsense" + ENTER)
    terminal.wait_for("error: unknown command /nonsense")
    terminal.type("/load nothing.json" + ENTER)
    terminal.wait_for("error: nothing.json cannot be read")
    terminal.type("first line" + NEWLINE + "second line" + ENTER)
    terminal.wait_for("cut: --max-tokens is reached")
    terminal.type("/save talk.json" + ENTER)
    terminal.wait_for("4 messages saved")
    assert terminal.leave() == 0
    messages = json.loads((home / "talk.json").read_text())["messages"]
    assert messages[0]["content"] == "Hello there"
    assert messages[2]["content"] == "first line\nsecond line"
    words = messages[1]["content"].split()
    assert all(word in terminal.text for word in words)


def test_what_is_typed_too_early_waits(terminal: Terminal) -> None:
    terminal.type("/set max_tokens 30" + ENTER)
    terminal.wait_for("max_tokens 30")
    terminal.type("Tell me a story" + ENTER + "/stats" + ENTER + "/exit" + ENTER)
    terminal.wait_for(r"last answer +30 tokens")
    while terminal._read(5):
        pass
    assert terminal.process.wait(30) == 0
    story = terminal.text[terminal.text.index("Tell me a story") : terminal.text.index("cut: --max-tokens")]
    assert "/stats" not in story.split("\n", 1)[1]


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal, home: Path) -> None:
    terminal.type("Write a very long story about a mouse." + ENTER)
    terminal.wait_for("mouse.*[Tt]he .* the ")
    terminal.type(CTRL_C)
    terminal.wait_for("stopped")
    terminal.type("half a question" + CTRL_C)  # and the line that is being written
    terminal.type("/save talk.json" + ENTER)
    terminal.wait_for("2 messages saved")
    said = json.loads((home / "talk.json").read_text())["messages"][1]
    assert said["role"] == "assistant"
    assert len(said["content"]) > 10
    terminal.type("/set max_tokens 8" + ENTER)
    terminal.wait_for("max_tokens 8")
    terminal.type("/regenerate" + ENTER)
    terminal.wait_for("cut: --max-tokens is reached")
    terminal.type("/stats" + ENTER)
    terminal.wait_for(r"messages +2\b")
    assert terminal.leave() == 0


def test_the_next_turn_goes_on_where_this_one_ended(terminal: Terminal) -> None:
    terminal.type("/set max_tokens 40" + ENTER)
    terminal.wait_for("max_tokens 40")
    terminal.type("Tell me about " + "mice and cats and dogs " * 20 + ENTER)
    terminal.wait_for("cut: --max-tokens is reached")
    time.sleep(2)  # the user reads; meanwhile the answer is processed as the next prompt will have it
    terminal.type("More" + ENTER)
    terminal.wait_for("cut: --max-tokens is reached")
    terminal.type("/stats" + ENTER)
    prompt, known = re.findall(r"\d+", terminal.wait_for(r"last prompt +\d+ tokens, \d+ of them"))
    assert int(prompt) - int(known) < 20


def test_the_shell_asks(home: Path) -> None:
    opened = Terminal(home, "--shell", "--max-tokens", "60", columns=60)
    try:
        for answer, said in (("n", "the user does not want"), ("maybe" + ENTER + "y", "exit code")):
            opened.type("/use shell" + ENTER)
            opened.wait_for("the next answer begins with a call of shell")
            opened.type("List the files" + ENTER)
            opened.wait_for(re.escape("Run it? [y]es"))
            assert str(home) in opened.text.replace("\r\n", "")
            opened.type(answer + ENTER)
            opened.wait_for(said)
            opened.type(CTRL_C)
            opened.wait_for("1 tool")
        assert opened.leave() == 0
    finally:
        opened.close()


def test_history_lasts_unless_it_is_switched_off(home: Path) -> None:
    for words, known in (((), True), (("--no-history",), False)):
        opened = Terminal(home, *words)
        try:
            opened.type(f"/system Be {'kind' if known else 'secretive'}." + ENTER)
            opened.wait_for("system message set")
            assert opened.leave() == 0
        finally:
            opened.close()
    text = (home / "flashmoe" / "chat_history").read_text()
    assert "Be kind." in text
    assert "secretive" not in text
    assert (home / "flashmoe" / "chat_history").stat().st_mode & 0o077 == 0
    opened = Terminal(home)
    try:
        opened.type("\x1b[A")  # up
        opened.wait_for(re.escape("/system Be kind."))
    finally:
        opened.close()
