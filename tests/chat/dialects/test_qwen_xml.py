"""Parameters as plain text: the schema gives types, values keep every character, markup inside them is no tag."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flashmoe.chat.dialects import ToolCallAborted, ToolCallArguments, ToolCallStart
from flashmoe.chat.dialects.qwen_xml import QwenXml

Read = Callable[..., Any]
QWEN = QwenXml()
TAGS = (
    "<tool_call>",
    "</tool_call>",
    "<function=weather>",
    "</function>",
    "<parameter=",
    "</parameter>",
    "\n",
    "<",
    "x>",
)


def weather(parameters: str) -> str:
    return f"<tool_call>\n<function=weather>\n{parameters}</function>\n</tool_call>"


def parameter(key: str, value: str) -> str:
    return f"<parameter={key}>\n{value}\n</parameter>\n"


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("city", "5", "5"),
        ("city", "null", "null"),
        ("city", "", ""),
        ("city", "\n", "\n"),
        ("city", "  two\nlines \n", "  two\nlines \n"),
        ("city", '"q" \\ \t\x01', '"q" \\ \t\x01'),
        ("days", "5", 5),
        ("days", " 5 ", 5),
        ("days", "5.0", 5),
        ("days", "five", "five"),
        ("days", "None", None),
        ("share", "0.5", 0.5),
        ("share", "1e3", 1000.0),
        ("share", ".5", ".5"),
        ("exact", "True", True),
        ("exact", "false", False),
        ("exact", "yes", "yes"),
        ("tags", '["a", "</parameter>"]', ["a", "</parameter>"]),
        ("tags", "['a', None]", ["a", None]),
        ("options", '{"a": {"b": [1]}}', {"a": {"b": [1]}}),
        ("options", "{a: 1}", "{a: 1}"),
        ("note", "null", None),
        ("note", "None", None),
        ("note", "5", "5"),
        ("unheard_of", "5", "5"),
    ],
)
def test_values_are_what_the_schema_says(read: Read, key: str, written: str, value: object) -> None:
    answer = read(QWEN, weather(parameter(key, written)), range(200))
    assert answer.calls == [("weather", {key: value})]
    assert type(answer.calls[0][1][key]) is type(value)


@given(value=st.lists(st.sampled_from(TAGS) | st.text(max_size=2)).map("".join), eager=st.booleans())
def test_tags_inside_a_string_are_text_unless_the_next_tag_follows(
    read: Read, value: str, eager: bool
) -> None:
    behind = value + "\n</parameter>\n</function>\n</tool_call>"
    closing = behind.split("</parameter>")[1:-1]
    assume(
        not any(part.lstrip().startswith(("<parameter=", "</function>", "</tool_call>")) for part in closing)
    )
    closing = value.split("</function>")[1:]
    assume(not any(part.lstrip().startswith("</tool_call>") for part in closing))
    answer = read(QWEN, weather(parameter("city", value)), range(0, 400, 7), eager=eager)
    assert answer.calls == [("weather", {"city": value})]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call><function=weather><parameter=city>x</parameter><parameter=days>3</parameter></function></tool_call>",
        "<function=weather>\n<parameter=city>\nx\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nx\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nx\n</parameter>\n<parameter=days>\n3\n</function>\n</tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nx\n</parameter>\n<parameter=days>\n3\n</parameter>\n</tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nx\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>",
        "<function=weather>\n<parameter=city>\nx\n</parameter>\n<parameter=days>\n3\n</function>",
    ],
)
def test_what_models_forget_is_forgiven(read: Read, text: str) -> None:
    for eager in (False, True):
        answer = read(QWEN, text, range(len(text)), eager=eager)
        assert answer.calls == [("weather", {"city": "x", "days": 3})]
        assert answer.text in ("", "\n</tool_call>")


def test_several_functions_in_one_block(read: Read) -> None:
    text = "<tool_call>\n<function=now>\n</function>\n<function=missing>\n</function>\n</tool_call>"
    assert read(QWEN, text).calls == [("now", {}), ("missing", {})]
    assert read(QWEN, text, eager=True).calls == [("now", {}), ("missing", {})]
    assert read(QWEN, text[:-30]).text == text[:-30]


@pytest.mark.parametrize(
    "text",
    [
        "Write <tool_call> and then <function=name> like that.",
        "<tool_call>\n{}\n</tool_call>",
        "<tool_call>\n<function=a b>\n</function>\n</tool_call>",
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
        "<function=missing>\n</function>",
        "<tool_call>\n<function=now>\nhello\n</function>\n</tool_call>",
        "<tool_call>\n<function=now>\n<parameter=a\n>\n</function>\n</tool_call>",
        "<tool_call>\n<function=now>\n</function>\nhello",
        "<tool_call>\n<function=" + "n" * 300,
    ],
)
def test_what_is_no_call_is_text(read: Read, text: str) -> None:
    for eager in (False, True):
        answer = read(QWEN, text, range(len(text)), eager=eager)
        assert (answer.calls, answer.given_back) == ([], text)


def test_a_call_ends_open_reasoning(read: Read) -> None:
    call = weather(parameter("city", "x"))
    answer = read(QWEN, f"I look.\n\n{call}", reasoning_open=True)
    assert (answer.reasoning, answer.text, answer.calls) == ("I look.", "", [("weather", {"city": "x"})])
    talk = "As <tool_call>\n<function=example>\n</function>\n</tool_call> says.\n</think>\n\nHi"
    answer = read(QWEN, talk, reasoning_open=True)
    assert answer.reasoning == talk[: talk.index("\n</think>")]
    assert (answer.text, answer.calls) == ("Hi", [])


def test_an_announced_call_that_breaks_is_taken_back(tools: list[Any]) -> None:
    parser = QWEN.parser(tools, eager=True)
    events = parser.push("Hi\n<tool_call>\n<function=weather>\n<parameter=city>\nZür")
    assert [type(event) for event in events][1:] == [ToolCallStart, ToolCallArguments]
    assert events[-1] == ToolCallArguments(0, '{"city": "Zür')
    [end] = parser.finish()
    assert end == ToolCallAborted(0, "\n<tool_call>\n<function=weather>\n<parameter=city>\nZür")


def test_calls_behind_a_taken_back_one_are_numbered_on(read: Read) -> None:
    broken = "<tool_call>\n<function=now>\nx"
    answer = read(QWEN, broken + weather(""), eager=True)
    assert answer.aborted == [broken[:-1]]
    assert (answer.text, answer.calls) == ("x", [("weather", {})])
    answer = read(QWEN, broken + weather(""))
    assert (answer.text, answer.calls) == (broken, [("weather", {})])
