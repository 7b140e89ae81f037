"""Markdown that is printed while it grows."""

from __future__ import annotations

import io
import re
import signal
from typing import Any

import pytest
from rich.console import Console
from rich.markdown import Markdown

from flashmoe.cli import chat_markdown
from flashmoe.cli.chat_markdown import MarkdownStream
from flashmoe.cli.chat_text import first_lines, printable

TEXT = """# Title

A paragraph with **bold** words, `code`, and enough of them to be wrapped somewhere in a narrow terminal.
# Directly below

- one
- two

  still two
- three

1. first
2. second

| a | b |
|---|---|
| 1 | 2 |

```python
def answer() -> int:

    return 42  # a line that is far too long for a narrow terminal, and is wrapped too
```
> quoted
lazily

#no heading
-no list
Setext
------

~~~
unclosed [bold]not markup[/bold]
"""


def shown(pieces: list[str], width: int = 60, terminal: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, height=12, force_terminal=terminal, color_system=None)
    stream = MarkdownStream(console)
    for piece in pieces:
        stream.push(piece)
    stream.close()
    return out.getvalue()


@pytest.fixture(autouse=True)
def every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is drawn, however quickly they come."""
    monkeypatch.setattr(chat_markdown, "_SECONDS", 0.0)
    monkeypatch.setattr(chat_markdown, "_SHARE", 0)


def words(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
@pytest.mark.parametrize("width", [20, 60, 200])
def test_the_end_is_what_the_whole_text_gives(size: int, width: int) -> None:
    pieces = [TEXT[i : i + size] for i in range(0, len(TEXT), size)]
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(
        Markdown(TEXT, hyperlinks=False, code_theme="ansi_dark")
    )
    assert words(shown(pieces, width)) == words(out.getvalue())


def test_finished_blocks_are_printed_once() -> None:
    text = shown(list("First block.\n\nSecond block.\n\nThird"), terminal=True)
    printed = text.rsplit("\x1b[2K", 1)[-1]
    assert "Third" in printed
    assert "First" not in printed


@pytest.mark.parametrize("moment", [True, False], ids=["cursor vanishes", "cursor returns"])
def test_ctrl_c_while_the_live_part_begins_or_ends(monkeypatch: pytest.MonkeyPatch, moment: bool) -> None:
    """What it has begun can be ended then, and the terminal is as it was."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60)
    show_cursor = console.show_cursor

    def pressed(show: bool = True) -> Any:
        if show is not moment:
            monkeypatch.setattr(console, "show_cursor", show_cursor)
            signal.raise_signal(signal.SIGINT)
        return show_cursor(show)

    monkeypatch.setattr(console, "show_cursor", pressed)
    stream = MarkdownStream(console)

    def answer() -> None:
        stream.push("one line")
        stream.close()

    with pytest.raises(KeyboardInterrupt):
        answer()
    stream.close()
    assert not console._render_hooks
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1


def test_a_long_block_shows_its_end_while_it_grows() -> None:
    out = io.StringIO()
    console = Console(file=out, width=40, height=8, force_terminal=True, color_system=None)
    stream = MarkdownStream(console)
    stream.push("```\n" + "".join(f"line {i}\n" for i in range(100)))
    drawn = out.getvalue()
    assert "line 99" in drawn
    assert "line 50" not in drawn
    stream.close()
    printed = re.findall(r"line (\d+)", out.getvalue().removeprefix(drawn))
    assert printed[-100:] == [str(i) for i in range(100)]


def test_what_would_steer_a_terminal_is_spelled_out() -> None:
    assert printable("a\x1b[31mb\x07\r\nc\td\u202ee\x9bf") == "a\\x1b[31mb\\x07\nc\td\\u202ee\\x9bf"
    for kept in ("naïve 正午 👩\u200d🚀", "a\u00a0b\u3000c", "ﷺ", "e\u0301"):
        assert printable(kept) == kept


def test_first_lines() -> None:
    assert first_lines("a\nb\n", 2) == "a\nb"
    assert first_lines("a\nb\nc\nd", 2) == "a\nb\n... 2 more lines"
