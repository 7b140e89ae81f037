"""Mistral's list of objects and its names with arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flashmoe.chat.dialects.mistral import Mistral
from flashmoe.chat.dialects.tagged import THINK

Read = Callable[..., Any]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ('[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]', ["id0", "id1"]),
        (
            '[TOOL_CALLS][{"name": "now", "id": "AbCdEf123", "arguments": {}},{"name": "now"}]',
            ["AbCdEf123", "id0"],
        ),
        ('[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}', ["id0", "id1"]),
        ("[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[CALL_ID]AbCdEf123[ARGS]{}", ["id0", "AbCdEf123"]),
        ("[TOOL_CALLS]now{}\n[TOOL_CALLS] now {}", ["id0", "id1"]),
    ],
)
def test_both_forms_are_read(read: Read, text: str, ids: list[str]) -> None:
    for eager in (False, True):
        answer = read(Mistral(), text, range(len(text)), eager=eager)
        assert (answer.text, answer.calls, answer.ids) == ("", [("now", {})] * 2, ids)


@pytest.mark.parametrize(
    "text",
    [
        "The marker [TOOL_CALLS] begins a call.",
        "[TOOL_CALLS] []",
        '[TOOL_CALLS] [{"name": "now", "arguments": {}}, ',
        '[TOOL_CALLS] [{"name": "now", "arguments": {}} {}]',
        "[TOOL_CALLS]now[ARGS][]",
        '[TOOL_CALLS]now[ARGS]{"a": ',
    ],
)
def test_what_is_no_call_is_text(read: Read, text: str) -> None:
    answer = read(Mistral(), text, range(len(text)))
    assert (answer.calls, answer.text) == ([], text)


def test_an_id_behind_the_arguments_comes_too_late_for_eager(read: Read) -> None:
    text = '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "AbCdEf123"}]'
    assert read(Mistral(), text).ids == ["AbCdEf123"]
    assert read(Mistral(), text, eager=True).ids == ["id0"]


def test_a_list_that_breaks_after_a_call_keeps_that_call_when_eager(read: Read) -> None:
    text = '[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "weather", "arguments": {"city": "x'
    answer = read(Mistral(), text, range(len(text)), eager=True)
    assert answer.calls == [("now", {})]
    assert answer.aborted == [text[text.index(", {") + 1 :]]


def test_ids_have_nine_characters_as_the_templates_demand(tools: list[Any]) -> None:
    [start, *_] = Mistral().parser(tools).push("[TOOL_CALLS]now[ARGS]{}")
    assert len(start.id) == 9  # type: ignore[union-attr]
    assert start.id.isalnum()  # type: ignore[union-attr]


def test_reasoning_has_the_markers_of_the_template(read: Read) -> None:
    answer = read(Mistral(), "[THINK]a[/THINK]b")
    assert (answer.reasoning, answer.text) == ("a", "b")
    answer = read(Mistral(think=THINK), "<think>\na\n</think>\nb")
    assert (answer.reasoning, answer.text) == ("a", "b")
