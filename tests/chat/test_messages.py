"""Conversations in all forms of OpenAI's API become what templates walk through."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from flashmoe.chat.messages import normalize_messages
from flashmoe.chat.template import ChatTemplate
from flashmoe.errors import PromptError


def call(arguments: object) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def assistant(*calls: object, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


@pytest.mark.parametrize(
    ("written", "arguments"),
    [('{"a": "é"}', {"a": "é"}), ({"a": [1]}, {"a": [1]}), ("", {}), (" \n", {}), (None, {})],
)
def test_arguments_become_mappings(written: object, arguments: object) -> None:
    given = [assistant(call(written))]
    before = copy.deepcopy(given)
    [message] = normalize_messages(given)
    assert message["tool_calls"] == [call(arguments)]
    assert message["content"] == ""
    assert given == before


def test_a_call_without_the_outer_object_is_kept_so() -> None:
    [message] = normalize_messages([assistant({"name": "f", "arguments": "{}"}, {"name": "g"})])
    assert message["tool_calls"] == [{"name": "f", "arguments": {}}, {"name": "g"}]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (assistant(call("{")), "arguments of the tool call 'f' are no JSON: "),
        (assistant(call("[1]")), "arguments of the tool call 'f' are no JSON object: "),
        (assistant(call(5)), "arguments of the tool call 'f' are no JSON object: "),
        (assistant(call('{"a":\n')), "arguments of the tool call 'f' are no JSON: "),
        (assistant("f"), r"messages\[1\] has a tool call that is no object"),
        (assistant({"function": {}}), r"messages\[1\] has a tool call without a name"),
        ({"role": "assistant", "tool_calls": 5}, r"messages\[1\] has a tool call that is no object"),
        ({"content": "x"}, r"messages\[1\] has no role"),
        ("Hello", r"messages\[1\] has no role"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            r"messages\[1\].*no text \(image_url\)",
        ),
        ({"role": "user", "content": [5]}, r"messages\[1\].*no text \(int\)"),
    ],
)
def test_what_cannot_be_read_is_a_one_line_error(message: Any, reason: str) -> None:
    with pytest.raises(PromptError, match=reason) as caught:
        normalize_messages([{"role": "user", "content": "Hi"}, message])
    assert "\n" not in str(caught.value)


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a\n"}, {"type": "text", "text": "b"}, "c"]
    assert normalize_messages([{"role": "user", "content": parts}])[0]["content"] == "a\nbc"


def test_tool_results_keep_what_they_answer() -> None:
    result = {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "f"}
    assert normalize_messages([result]) == [result]


def test_a_developer_is_the_system_where_the_template_has_none() -> None:
    messages = [{"role": "developer", "content": "Be brief."}]
    assert normalize_messages(messages)[0]["role"] == "system"
    assert normalize_messages(messages, developer_role=True)[0]["role"] == "developer"
    assert ChatTemplate("{{ messages[0].role }}", "t").render(messages) == "system"
    has_one = "{% if messages[0].role == 'developer' %}yes{% endif %}"
    assert ChatTemplate(has_one, "t").render(messages) == "yes"


def test_reasoning_has_the_name_of_the_template() -> None:
    for name in ("reasoning_content", "reasoning"):
        messages = [{"role": "assistant", "content": "x", name: "hm"}]
        assert ChatTemplate("{{ messages[0].reasoning_content }}", "t").render(messages) == "hm"
        source = "{% for message in messages %}{{ message.thinking }}{% endfor %}"
        assert ChatTemplate(source, "t").render(messages) == "hm"


def test_an_empty_list_of_calls_is_none() -> None:
    assert (
        "tool_calls" not in normalize_messages([{"role": "assistant", "content": "x", "tool_calls": []}])[0]
    )
