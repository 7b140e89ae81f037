"""DeepSeek's special tokens, with and without the outer pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flashmoe.chat.dialects.deepseek import DeepSeek

Read = Callable[..., Any]
CALL = '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "```"}<｜tool▁call▁end｜>'
FENCED = (
    '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "```"}\n```<｜tool▁call▁end｜>'
)


@pytest.mark.parametrize(
    "text",
    [
        f"<｜tool▁calls▁begin｜>{CALL}\n{FENCED}<｜tool▁calls▁end｜>",
        f"{CALL}{FENCED}",
        f"<｜tool▁calls▁begin｜>\n{FENCED}\n{CALL}\n<｜tool▁calls▁end｜>\n",
        f"<｜tool▁calls▁begin｜>{CALL}{FENCED}"[: -len("<｜tool▁call▁end｜>")],
        f"<｜tool▁calls▁begin｜>{CALL}{FENCED}<｜tool▁calls",
    ],
)
def test_both_forms_are_read(read: Read, text: str) -> None:
    answer = read(DeepSeek(), text, range(len(text)))
    assert (answer.text, answer.calls) == ("", [("weather", {"city": "```"})] * 2)


@pytest.mark.parametrize(
    "text",
    [
        CALL.replace("{", "{{"),
        CALL.replace("weather", ""),
        CALL.replace("<｜tool▁sep｜>", " "),
        FENCED.replace("```json", "```python"),
        FENCED.replace("\n```<", "\n``<"),
        "<｜tool▁calls▁begin｜>" + CALL[:-20],
        "a <｜tool▁calls▁begin｜> b",
        "<｜tool▁calls▁end｜>",
    ],
)
def test_what_is_no_call_is_text(read: Read, text: str) -> None:
    answer = read(DeepSeek(), text, range(len(text)))
    assert (answer.calls, answer.text) == ([], text)


def test_a_function_may_be_called_function(read: Read) -> None:
    text = CALL.replace("weather", "function")
    assert read(DeepSeek(), text).calls == [("function", {"city": "```"})]
