"""`flashmoe chat` without a terminal: a prompt a line, plain answers; notes, reasoning and tools go to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flashmoe.chat.dialects import ReasoningDelta, TextDelta
from flashmoe.chat.tool_loop import ToolResult, ToolStarted
from flashmoe.cli.chat_commands import Next, is_command, message_of, run_command
from flashmoe.cli.chat_state import Chat
from flashmoe.cli.chat_text import first_lines, printable
from flashmoe.errors import PromptError

if TYPE_CHECKING:
    from flashmoe.chat.tool_loop import TurnEvent

_RESULT_LINES = 8


class PlainView:
    """The answer's text as it comes."""

    def __init__(self, show_reasoning: bool) -> None:
        self._show_reasoning = show_reasoning
        self._safe = printable if sys.stdout.isatty() else str
        self._open = ""  # what was printed last and does not end its line: "out" or "err"

    def show(self, event: TurnEvent) -> None:
        """See View."""
        if isinstance(event, TextDelta):
            self._to("out")
            print(self._safe(event.text), end="", flush=True)
            self._open = "out"
        elif isinstance(event, ReasoningDelta) and self._show_reasoning:
            self._to("err")
            print(printable(event.text), end="", file=sys.stderr, flush=True)
            self._open = "err"
        elif isinstance(event, ToolStarted):
            self._to("")
            print(f"tool: {event.name} {printable(event.arguments)}", file=sys.stderr)
        elif isinstance(event, ToolResult):
            print(printable(first_lines(event.text, _RESULT_LINES)), file=sys.stderr)

    def close(self) -> None:
        """See View."""
        self._to("")

    def _to(self, stream: str) -> None:
        """End a line that another stream has begun."""
        if self._open not in ("", stream):
            print(file=sys.stderr if self._open == "err" else sys.stdout, flush=True)
            self._open = ""


def run_pipe(chat: Chat) -> None:
    """Answer the lines of stdin; blank ones are skipped.  Raises FlashmoeError for the first that cannot be."""
    for line in _lines():
        if is_command(line):
            outcome = run_command(chat, line)
            if outcome.note:
                print(printable(outcome.note), file=sys.stderr)
            if outcome.next is Next.LEAVE:
                return
            if outcome.next is Next.NOTHING:
                continue
        else:
            chat.transcript.ask(message_of(line))
        chat.run_turn(PlainView(chat.show_reasoning))


def _lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            if text := line.strip():
                yield text
    except UnicodeDecodeError as error:
        raise PromptError(f"stdin is no {error.encoding} text: give prompts in UTF-8") from error
