"""Text that is still coming, read as if it were all there.

A reading function is a generator: it yields whenever it needs more text, and goes on where it stopped.  Every decision
waits until the text seen so far settles it, so how the text is cut never changes what is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

from flashmoe.chat.dialects.json_scan import JsonScanner, Malformed

T = TypeVar("T")
Step = Generator[None, None, T]

# Longer than any function's name, short enough that nobody waits for the end of one that never comes.
_LONGEST_NAME = 256
_NAME = re.compile(r"[^\s<>{}\[\]\"]*")


class Source:
    """The text of one answer.  Not thread-safe.

    text[:position] has been read.  Positions stay valid until forget().
    """

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.ended = False

    def forget(self) -> None:
        """Drop what has been read; positions noted before are void."""
        self.text = self.text[self.position :]
        self.position = 0

    def take(self, end: int) -> str:
        """Read up to ``end``."""
        taken = self.text[self.position : end]
        self.position = max(self.position, end)
        return taken

    def more(self) -> Step[None]:
        """Wait for more text.  Raises Malformed, with everything read, when there is none."""
        if self.ended:
            self.position = len(self.text)
            raise Malformed
        yield

    def starts(self, *prefixes: str) -> Step[str | None]:
        """Which of these comes next, if any; nothing is read.  None of them may begin another one."""
        longest = max((len(prefix) for prefix in prefixes), default=0)
        while True:
            here = self.text[self.position : self.position + longest]
            for prefix in prefixes:
                if here.startswith(prefix):
                    return prefix
            if self.ended or not any(prefix.startswith(here) for prefix in prefixes):
                return None
            yield

    def accept(self, *prefixes: str) -> Step[str | None]:
        """Like starts(), and reads it."""
        found = yield from self.starts(*prefixes)
        self.position += len(found or "")
        return found

    def expect(self, *prefixes: str) -> Step[str]:
        """Like accept().  Raises Malformed when something else comes."""
        found = yield from self.accept(*prefixes)
        if found is None:
            if self.at_end(*prefixes):
                yield from self.more()
            raise Malformed
        return found

    def closing(self, *markers: str) -> Step[None]:
        """Read white space and one of the markers, or a part of it that the end of the text cut off."""
        yield from self.spaces()
        if (yield from self.accept(*markers)) is not None:
            return
        if not self.at_end(*markers):
            raise Malformed
        self.position = len(self.text)

    def at_end(self, *markers: str) -> bool:
        """Whether the text has ended here, or within one of the markers."""
        return self.ended and any(marker.startswith(self.text[self.position :]) for marker in markers)

    def spaces(self, characters: str | None = None) -> Step[None]:
        """Read white space (or these characters) up to something else or the end."""
        while True:
            rest = self.text[self.position :]
            self.position += len(rest) - len(rest.lstrip(characters))
            if self.position < len(self.text) or self.ended:
                return
            yield

    def name(self) -> Step[str]:
        """Read a function's name, up to a character that none has."""
        while True:
            end = _NAME.match(self.text, self.position, self.position + _LONGEST_NAME + 1).end()  # type: ignore[union-attr]
            if end - self.position > _LONGEST_NAME:
                raise Malformed
            if end < len(self.text):
                break
            yield from self.more()
        if end == self.position:
            raise Malformed
        return self.take(end)

    def until(self, marker: str, forbidden: str = "\n") -> Step[str]:
        """Read up to the marker and the marker; the text before it, which has at most 256 characters."""
        while True:
            window = self.text[self.position : self.position + _LONGEST_NAME + len(marker)]
            before, found, _ = window.partition(marker)
            if forbidden in before or (not found and len(window) == _LONGEST_NAME + len(marker)):
                raise Malformed
            if found:
                self.position += len(before) + len(marker)
                return before
            yield from self.more()

    def json(self, emit: Callable[[str], None] | None = None) -> Step[str]:
        """Read one JSON value and return its text, passing the pieces on as they come."""
        scanner = JsonScanner()
        pieces = []
        while not scanner.done:
            try:
                scanner.scan(self.text, self.position)
            finally:
                self.position = scanner.position
                piece = scanner.taken()
                pieces.append(piece)
                if emit is not None and piece:
                    emit(piece)
            if not scanner.done:
                yield from self.more()
        return "".join(pieces)

    def find(self, markers: tuple[str, ...]) -> tuple[int, str] | None:
        """The first marker in the text that is there: (its position, itself)."""
        found = [(at, marker) for marker in markers if (at := self.text.find(marker, self.position)) >= 0]
        return min(found, default=None)

    def settled(self, markers: tuple[str, ...]) -> int:
        """Up to where the text that is there can neither begin a marker nor be the white space before one."""
        end = len(self.text)
        longest = max((len(marker) for marker in markers), default=1) - 1
        for start in range(max(self.position, end - longest), end):
            if any(marker.startswith(self.text[start:]) for marker in markers):
                end = start
                break
        return self.position + len(self.text[self.position : end].rstrip())
