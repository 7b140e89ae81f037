"""Finds the end of a JSON value in text that is still coming; stops at the first character that cannot be JSON."""

from __future__ import annotations

import re

# So deep the json module of every client still reads; models nest a handful of levels.
_DEEPEST = 200
# Python's own json refuses integers of more than 4,300 digits.
_LONGEST_NUMBER = 1000

_SPACES = re.compile(r"[ \t\n\r]+")
_CHARACTERS = re.compile(r'[^"\\]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\]*)*')
_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_CONTROL = re.compile(r"[\x00-\x1f]")
_WORD = re.compile(r'[^\s,:"\[\]{}]*')
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
_SCALAR_STARTS = frozenset("-0123456789tfn")


class Malformed(Exception):  # noqa: N818 - no error of the user's: the text is no call, and goes on as text
    """The text is not, or can no longer become, what was expected."""


class JsonScanner:
    """Scans one value.  Not thread-safe; one object per value.

    The only repair: control characters inside a string, which models leave raw and JSON forbids, come out escaped.
    """

    def __init__(self) -> None:
        self.done = False
        self.position = 0
        self._out: list[str] = []
        self._open: list[str] = []
        self._expected = "value"
        self._in_string = False

    def scan(self, text: str, start: int) -> None:
        """Go on at ``start``, as far as the text goes; ``position`` is then behind what has been understood.

        Raises Malformed; position and taken() then have what came before the offence.
        """
        self.position = start
        while not self.done and self.position < len(text):
            before = self.position
            if self._in_string:
                self._string(text)
            else:
                self._token(text)
            if self.position == before:
                return  # the beginning of a number or of an escape

    def taken(self) -> str:
        """The JSON text understood since the last time."""
        text = "".join(self._out)
        self._out.clear()
        return text

    def _advance(self, text: str, end: int) -> None:
        self._out.append(text[self.position : end])
        self.position = end

    def _string(self, text: str) -> None:
        end = _CHARACTERS.match(text, self.position).end()  # type: ignore[union-attr]  # it matches nothing, too
        self._out.append(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text[self.position : end]))
        self.position = end
        if end == len(text):
            return
        if text[end] == '"':
            self._advance(text, end + 1)
            self._in_string = False
            self._value_ended()
        elif not _ESCAPE_BEGUN.match(text, end):
            raise Malformed

    def _token(self, text: str) -> None:
        spaces = _SPACES.match(text, self.position)
        if spaces:
            self._advance(text, spaces.end())
            return
        character = text[self.position]
        if character in _SCALAR_STARTS:
            self._scalar(text)
            return
        self._punctuation(character)
        self._advance(text, self.position + 1)

    def _punctuation(self, character: str) -> None:
        if character == '"':
            self._require("value", "value]", "key", "key}")
            self._in_string = True
        elif character in "{[":
            self._require("value", "value]")
            if len(self._open) == _DEEPEST:
                raise Malformed
            self._open.append(character)
            self._expected = "key}" if character == "{" else "value]"
        elif character in "}]":
            if not self._open or self._open[-1] != {"}": "{", "]": "["}[character]:
                raise Malformed
            self._require(",", "key}", "value]")
            self._open.pop()
            self._expected = "value"
            self._value_ended()
        elif character == ":":
            self._require(":")
            self._expected = "value"
        elif character == ",":
            self._require(",")
            self._expected = "key" if self._open[-1] == "{" else "value"
        else:
            raise Malformed

    def _scalar(self, text: str) -> None:
        self._require("value", "value]")
        end = _WORD.match(text, self.position).end()  # type: ignore[union-attr]
        if end - self.position > _LONGEST_NUMBER:
            raise Malformed
        if end == len(text):
            return  # a number ends where something else begins
        if not _SCALAR.fullmatch(text, self.position, end):
            raise Malformed
        self._advance(text, end)
        self._value_ended()

    def _require(self, *expected: str) -> None:
        if self._expected not in expected:
            raise Malformed

    def _value_ended(self) -> None:
        if self._expected in ("key", "key}"):
            self._expected = ":"
        elif self._open:
            self._expected = ","
        else:
            self.done = True
