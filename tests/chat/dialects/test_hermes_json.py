"""One JSON object per call, in the shapes that models give it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flashmoe.chat.dialects.hermes_json import HermesJson

Read = Callable[..., Any]
HERMES = HermesJson()


def tagged(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        (
            '{"name": "weather", "arguments": {"city": "</tool_call> <tool_call>"}}',
            {"city": "</tool_call> <tool_call>"},
        ),
        ('{"arguments": {"city": "x"}, "name": "weather"}', {"city": "x"}),
        ('{"id": "7", "type": "function", "name": "weather", "arguments": {"a": [{}, []]}}', {"a": [{}, []]}),
        ('{"name": "weather", "parameters": {"days": 1.0}}', {"days": 1.0}),
        ('{"name": "weather", "arguments": "{\\"city\\": \\"x\\"}"}', {"city": "x"}),
        ('{"name": "weather", "arguments": null}', {}),
        ('{"name": "weather", "arguments": ""}', None),
        ('{"name": "weather"}', {}),
        ('{"name":"weather","arguments":{"city":"two\nlines\tand tab"}}', {"city": "two\nlines\tand tab"}),
        ('{"name": "weather", "arguments": {"city": "\\ud83d\\ude00 \\u00e9"}}', {"city": "😀 é"}),
        ("{\"name\": 'weather'}", None),
        ('{"name": "weather", "arguments": [1]}', None),
        ('{"name": "weather", "arguments": {"a": 1,}}', None),
        ('{"name": "weather", "arguments": {"a": 01}}', None),
        ('{"name": "weather", "arguments": {"a": NaN}}', None),
        ('{"name": "weather", "arguments": {}, "arguments": {}}', None),
        ('{"name": "", "arguments": {}}', None),
        ('{"name": 5, "arguments": {}}', None),
        ('{"arguments": {}}', None),
        ("{}", None),
        ("[]", None),
        ('{"name": "weather", "arguments": {}}}', None),
    ],
)
def test_a_call_is_one_object(read: Read, body: str, arguments: dict[str, Any] | None) -> None:
    text = tagged(body)
    for eager in (False, True):
        answer = read(HERMES, text, range(len(text)), eager=eager)
        if arguments is None:
            assert (answer.calls, answer.given_back) == ([], text)
        else:
            assert (answer.calls, answer.given_back) == ([("weather", arguments)], "")


def test_the_text_of_the_arguments_is_kept(tools: list[Any]) -> None:
    parser = HERMES.parser(tools)
    events = parser.push(
        tagged('{"name": "weather", "arguments": {"share": 1.50, "days":  12345678901234567890}}')
    )
    assert events[1].json_delta == '{"share": 1.50, "days":  12345678901234567890}'  # type: ignore[union-attr]


def test_the_id_of_the_model_is_taken(read: Read) -> None:
    assert read(HERMES, tagged('{"id": "abc", "name": "now"}')).ids == ["abc"]


def test_ids_are_random_and_of_openais_form(tools: list[Any]) -> None:
    call = tagged('{"name": "now"}')
    ids = [HERMES.parser(tools).push(call)[0].id for _ in range(2)]  # type: ignore[union-attr]
    assert ids[0] != ids[1]
    assert all(call_id.startswith("call_") and len(call_id) == 29 for call_id in ids)


def test_a_deep_value_is_refused_before_it_breaks_a_reader(read: Read) -> None:
    deep = "[" * 5000 + "]" * 5000
    text = tagged(f'{{"name": "weather", "arguments": {{"tags": {deep}}}}}')
    assert read(HERMES, text).text == text
    text = tagged(f'{{"name": "weather", "arguments": {{"days": {"1" * 5000}}}}}')
    assert read(HERMES, text).text == text
