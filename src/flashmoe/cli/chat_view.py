"""A turn of `flashmoe chat` in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from flashmoe.chat.dialects import ReasoningDelta, TextDelta
from flashmoe.chat.session import AnswerEnd, Reading
from flashmoe.chat.tool_loop import ToolResult, ToolStarted
from flashmoe.cli.chat_markdown import MarkdownStream
from flashmoe.cli.chat_text import first_lines, printable

if TYPE_CHECKING:
    from flashmoe.chat.tool_loop import TurnEvent

_RESULT_LINES = 8


class TerminalView:
    """Reasoning dimmed, answers as Markdown, calls and results as they happen.  Not thread-safe."""

    def __init__(self, console: Console, show_reasoning: bool) -> None:
        self._console, self._show_reasoning = console, show_reasoning
        self._stream: MarkdownStream | None = None
        self._kind = ""
        self._waiting: Live | None = None
        self._thoughts = 0

    def show(self, event: TurnEvent) -> None:
        """See View."""
        if isinstance(event, Reading):
            self._wait(f"reading the prompt: {event.done:,} of {event.total:,} tokens")
        elif isinstance(event, ReasoningDelta):
            self._reason(event.text)
        elif isinstance(event, TextDelta):
            self._begin("answer", "none").push(printable(event.text))
        elif isinstance(event, ToolStarted):
            self.close()
            line = Text("-> ", style="bold cyan").append(f"{event.name} {printable(event.arguments)}", "cyan")
            self._console.print(line)
        elif isinstance(event, ToolResult):
            style = "red" if event.failed else "dim"
            self._console.print(Text(printable(first_lines(event.text, _RESULT_LINES)), style=style))
        elif isinstance(event, AnswerEnd):
            self._end(event)

    def close(self) -> None:
        """See View."""
        self._stop_waiting()
        if self._stream is not None:
            self._stream.close()
            self._console.print()
            self._stream, self._kind = None, ""

    def _end(self, end: AnswerEnd) -> None:
        self.close()
        if end.reason == "length":
            note = "cut: --max-tokens is reached, or the context is full (/set max_tokens N, /clear)"
            self._console.print(Text(note, style="yellow"))

    def _reason(self, text: str) -> None:
        if self._show_reasoning:
            if self._kind != "reasoning":
                self._begin("reasoning", "dim")
                self._console.print(Text("thinking", style="dim italic"))
            self._begin("reasoning", "dim").push(printable(text))
            return
        self._thoughts += 1
        self._wait(f"thinking: {self._thoughts:,} pieces (/reasoning show)")

    def _begin(self, kind: str, style: str) -> MarkdownStream:
        """The stream of this kind of text; one of another kind ends."""
        self._stop_waiting()
        if self._stream is None or self._kind != kind:
            self.close()
            self._stream, self._kind = MarkdownStream(self._console, style), kind
        return self._stream

    def _wait(self, text: str) -> None:
        if self._waiting is None:
            self._waiting = Live(console=self._console, auto_refresh=False, transient=True)
            self._waiting.start()
        self._waiting.update(Text(text, style="dim", no_wrap=True, overflow="ellipsis"), refresh=True)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.stop()
            self._waiting = None
