"""`flashmoe chat` in a terminal: the line editor, Ctrl-C and Ctrl-D, and what asks the user in between."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle
from rich.console import Console
from rich.text import Text

from flashmoe.chat.shell_tool import Approval
from flashmoe.cli.chat_commands import COMMANDS, Next, Outcome, is_command, message_of, run_command
from flashmoe.cli.chat_state import Chat
from flashmoe.cli.chat_text import printable
from flashmoe.cli.chat_view import TerminalView
from flashmoe.errors import FlashmoeError

_QUOTES = '"""'
_FILES = ("/save ", "/load ")
_APPROVALS = {"y": Approval.YES, "n": Approval.NO, "a": Approval.ALWAYS}


def run_terminal(chat: Chat, console: Console, history: bool) -> None:
    """Talk until the user leaves.  Nothing but that, or a bug of ours, ends it."""
    with _keys_for_later():
        _talk(chat, console, history)


def _talk(chat: Chat, console: Console, history: bool) -> None:
    editor = _editor(chat, _history(console) if history else InMemoryHistory())
    tools = f", {_tools(chat)}" if chat.toolbox.tools else ""
    console.print(Text(f"{chat.name}{tools}. /help lists commands; Ctrl-D leaves.", style="dim"))
    while True:
        try:
            line = _unquoted(editor.prompt("> "))
            if line and _handle(chat, console, line) is Next.LEAVE:
                return
        except EOFError:
            return
        except KeyboardInterrupt:  # the line that was being written, or the answer
            continue


def ask_approval(console: Console, directory: Path) -> Callable[[str], Approval]:
    """Asks the user about each command; Ctrl-C ends the turn."""
    asker: PromptSession[str] = PromptSession()

    def ask(command: str) -> Approval:
        console.print(Text(f"The model wants to run, in {directory}:", style="bold"))
        console.print(Text(printable(command), style="bold yellow"))
        while True:
            try:
                said = asker.prompt("Run it? [y]es, [n]o, [a]lways exactly this: ").strip().lower()
            except EOFError:
                return Approval.NO
            if said[:1] in _APPROVALS and said in ("y", "yes", "n", "no", "a", "always"):
                return _APPROVALS[said[:1]]

    return ask


@contextmanager
def _keys_for_later() -> Iterator[None]:
    """What is typed while the model answers is not echoed into the answer, and waits for the editor as it was typed.

    Otherwise the terminal would turn Enter into Ctrl-J, which the editor takes for a new line.
    """
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    changed = termios.tcgetattr(descriptor)
    changed[0] &= ~termios.ICRNL
    changed[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(descriptor, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _handle(chat: Chat, console: Console, line: str) -> Next:
    """A command or a message."""
    try:
        if is_command(line):
            outcome = run_command(chat, line)
        else:
            chat.transcript.ask(message_of(line))
            outcome = Outcome(next=Next.ANSWER)
        if outcome.note:
            console.print(Text(printable(outcome.note), style="dim"))
        if outcome.next is Next.ANSWER:
            _answer(chat, console)
    except FlashmoeError as error:
        console.print(Text(f"error: {error}", style="red"))
        return Next.NOTHING
    return outcome.next


def _answer(chat: Chat, console: Console) -> None:
    before = len(chat.transcript.messages)
    try:
        chat.run_turn(TerminalView(console, chat.show_reasoning))
    except KeyboardInterrupt:
        kept = len(chat.transcript.messages) >= before
        note = "stopped" if kept else "stopped before an answer began: the question is taken back"
        console.print(Text(note, style="yellow"))


def _editor(chat: Chat, history: History) -> PromptSession[str]:
    return PromptSession(
        history=history,
        multiline=True,
        key_bindings=_keys(),
        completer=_CommandCompleter(),
        complete_while_typing=True,
        complete_style=CompleteStyle.COLUMN,
        reserve_space_for_menu=4,
        prompt_continuation=lambda width, line_number, wraps: "." * (width - 1) + " ",
        bottom_toolbar=lambda: _toolbar(chat),
        enable_open_in_editor=True,
        tempfile_suffix=".md",
    )


def _toolbar(chat: Chat) -> str:
    parts = [chat.name, f"{chat.context_used:,}/{chat.session.llm.plan.context:,} tokens"]
    if chat.last is not None and chat.last.decode_tok_s is not None:
        parts.append(f"{chat.last.decode_tok_s:.1f} tok/s")
    if chat.toolbox.tools:
        parts.append(_tools(chat))
    return "  ".join(parts)


def _tools(chat: Chat) -> str:
    count = len(chat.toolbox.tools)
    return f"{count} tool{'s' if count > 1 else ''}"


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        text = buffer.document.text
        if text.count(_QUOTES) % 2:
            buffer.insert_text("\n")
        elif buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _unquoted(text: str) -> str:
    """Without the three quotes around a message of several lines."""
    line = text.strip()
    if len(line) >= 2 * len(_QUOTES) and line.startswith(_QUOTES) and line.endswith(_QUOTES):
        return line[len(_QUOTES) : -len(_QUOTES)].strip()
    return line


class _CommandCompleter(Completer):
    """Commands at the beginning of a line, and names of files behind those that take one."""

    def __init__(self) -> None:
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """See Completer."""
        text = document.text_before_cursor
        if not is_command(text) or "\n" in text:
            return
        if text.startswith(_FILES):
            rest = Document(text.partition(" ")[2])
            yield from self._files.get_completions(rest, complete_event)
        elif " " not in text:
            for command in COMMANDS:
                if command.name.startswith(text[1:]):
                    yield Completion(f"/{command.name}", -len(text), display_meta=command.text)


def _history(console: Console) -> History:
    """What was typed in earlier runs; only for this run where the file cannot be written."""
    path = platformdirs.user_state_path("flashmoe") / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        note = f"note: {path}: {error.strerror}; what you type is remembered until you leave"
        console.print(Text(note, style="dim"))
        return InMemoryHistory()
    return _ForgivingHistory(str(path))


class _ForgivingHistory(FileHistory):
    """Typing goes on when the file cannot be written any more."""

    def store_string(self, string: str) -> None:
        """See History."""
        try:
            super().store_string(string)
        except (OSError, UnicodeError):  # a full drive, half of a surrogate pair that was pasted
            return
