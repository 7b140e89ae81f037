"""Markdown that grows: finished blocks are printed for good, only the one that still grows is redrawn."""

from __future__ import annotations

import time
from itertools import pairwise

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from flashmoe.cli.interrupts import held_back

# Redrawing takes at most a tenth of the time, and happens ten times a second at most: the processor has a model to run.
_SECONDS = 0.1
_SHARE = 10

_PARSER = MarkdownIt().enable("strikethrough").enable("table")  # as rich reads it


class MarkdownStream:
    """Not thread-safe.  close() prints what is left."""

    def __init__(self, console: Console, style: str = "none") -> None:
        self._console, self._style = console, style
        self._text = ""  # of blocks that are not printed yet
        self._live: Live | None = None
        self._due = 0.0
        self._printed = False

    def push(self, text: str) -> None:
        """The next piece of text."""
        self._text += text
        now = time.monotonic()
        if now < self._due:
            return
        self._settle()
        self._redraw()
        took = time.monotonic() - now
        self._due = now + took + max(_SECONDS, _SHARE * took)

    def close(self) -> None:
        """The text has ended."""
        with held_back():
            if self._live is not None:
                self._live.stop()
                self._live = None
        for block in _blocks(self._text):
            self._print(block)
        self._text = ""

    def _settle(self) -> None:
        """Print the blocks that cannot change any more: all before the last one that begins in a complete line."""
        complete = self._text[: self._text.rfind("\n") + 1]
        for block in _blocks(complete)[:-1]:
            self._print(block)
            self._text = self._text[len(block) :]

    def _print(self, block: str) -> None:
        if block.strip():
            self._console.print(_Block(self._markdown(block), self._printed))
            self._printed = True

    def _redraw(self) -> None:
        if not self._console.is_terminal:
            return
        if self._live is None:
            with held_back():  # one that has begun by half cannot be stopped
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
        most = max(1, self._console.height - 2)
        block = _Block(self._markdown(_end_of(self._text, most)), self._printed, most)
        self._live.update(block, refresh=True)

    def _markdown(self, text: str) -> Markdown:
        return Markdown(text, style=self._style, hyperlinks=False, code_theme="ansi_dark")


class _Block:
    """Markdown without the empty lines around it, but one before it when it follows another block.

    most: of so many lines, the last ones.
    """

    def __init__(self, content: Markdown, follows: bool, most: int | None = None) -> None:
        self._content, self._follows, self._most = content, follows, most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options, pad=False)
        filled = [i for i, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        lines = lines[filled[0] : filled[-1] + 1] if filled else []
        if self._follows:
            lines = [[], *lines]
        for line in lines[-self._most :] if self._most else lines:
            yield from line
            yield Segment.line()


def _blocks(text: str) -> list[str]:
    """The text cut where its outermost blocks begin."""
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map]
    cuts = [0, *sorted({start for start in starts if start}), None]
    lines = text.split("\n")
    parts = ["\n".join([*lines[a:b], ""]) for a, b in pairwise(cuts)]
    return [*parts[:-1], parts[-1].removesuffix("\n")]


def _end_of(text: str, lines: int) -> str:
    """A long block of code without its beginning, which would not be seen: drawing a screen has to stay quick."""
    first, _, rest = text.partition("\n")
    fence = first.lstrip()[:3]
    if fence not in ("```", "~~~") or rest.count("\n") <= lines:
        return text
    return "\n".join([first, *rest.split("\n")[-lines:]])
