"""Text of models, tools and files as a terminal may show it."""

from __future__ import annotations

import unicodedata

# Control and format characters (some turn the direction of text around), halves of pairs, separators of lines.
_STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_NEEDED = "\n\t\u200c\u200d\u00ad"  # joiners in many scripts and emoji, the soft hyphen


def printable(text: str) -> str:
    """Without what would steer a terminal or hide something: such characters are spelled out.

    Line feeds and tabs stay; carriage returns before a line feed go.
    """
    return "".join(_shown(char) for char in text.replace("\r\n", "\n"))


def _shown(char: str) -> str:
    if char in _NEEDED or unicodedata.category(char) not in _STEERING:
        return char
    return ascii(char)[1:-1]


def first_lines(text: str, most: int) -> str:
    """At most so many lines, and how many more there are."""
    lines = text.splitlines()
    if len(lines) <= most:
        return "\n".join(lines)
    return "\n".join([*lines[:most], f"... {len(lines) - most} more lines"])
