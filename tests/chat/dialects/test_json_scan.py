"""The scanner agrees with the json module on what a value is, however it is cut."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flashmoe.chat.dialects.json_scan import JsonScanner, Malformed

BITS = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"',
    '"a"',
    "1",
    "-",
    "0.5",
    "e3",
    "true",
    "nul",
    "\\",
    "\\u00e9",
    "\n",
    " ",
    "\x01",
]


def scanned(text: str) -> str | None:
    """The value as it came out, scanned character by character; None when malformed or unfinished."""
    scanner = JsonScanner()
    try:
        for end in range(1, len(text) + 1):
            scanner.scan(text[:end], scanner.position)
    except Malformed:
        return None
    return scanner.taken() if scanner.done and scanner.position == len(text) else None


def loaded(text: str) -> tuple[bool, Any]:
    try:
        return True, json.loads(text, strict=False)
    except ValueError:
        return False, None


@given(text=st.lists(st.sampled_from(BITS)).map("".join))
def test_it_takes_what_json_takes(text: str) -> None:
    text = "[" + text
    assume(not text[-1].isspace())  # white space behind a value is no part of it
    valid, value = loaded(text)
    found = scanned(text)
    assert (found is not None) == valid
    if found is not None:
        assert json.loads(found) == value


@given(
    value=st.recursive(
        st.none() | st.floats(allow_nan=False) | st.text(),
        lambda v: st.dictionaries(st.text(), v) | st.lists(v),
    )
)
def test_its_text_is_kept(value: Any) -> None:
    text = json.dumps([value], ensure_ascii=False)
    assume(not re.search("Infinity", text))
    assert scanned(text) == text


@pytest.mark.parametrize(
    "text", ["[" * 201 + "]" * 201, "[" + "1" * 1001 + "]", "[NaN]", "[True]", "{'a': 1}", "[1,]", "]"]
)
def test_what_a_reader_may_refuse_is_refused(text: str) -> None:
    assert scanned(text) is None


def test_control_characters_in_strings_are_escaped() -> None:
    assert scanned('["a\n\tb",\n1]') == '["a\\u000a\\u0009b",\n1]'
