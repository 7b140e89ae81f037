"""Messages on channels: what is reasoning, what is text, what is a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flashmoe.chat.dialects.harmony import Harmony

Read = Callable[..., Any]
HARMONY = Harmony()
WEATHER = [("weather", {"city": "<|end|>"})]


@pytest.mark.parametrize(
    "call",
    [
        '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "<|end|>"}<|call|>',
        '<|channel|>commentary to=functions.weather<|constrain|>json<|message|> {"city": "<|end|>"}\n<|call|>',
        '<|channel|>commentary to=weather code<|message|>{"city": "<|end|>"}<|call|>',
        '<|channel|>analysis to=functions.weather<|message|>{"city": "<|end|>"}<|end|>',
        '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "<|end|>"}<|call|>',
        '<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "<|end|>"}',
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "<|end|>"}<|ca',
    ],
)
def test_headers_of_calls(read: Read, call: str) -> None:
    for eager in (False, True):
        answer = read(HARMONY, call, range(len(call)), eager=eager)
        assert (answer.text, answer.reasoning, answer.calls) == ("", "", WEATHER)


def test_a_whole_answer(read: Read) -> None:
    text = (
        "<|channel|>analysis<|message|>I think.\n<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "x"}<|call|>'
        "<|start|>assistant<|channel|>analysis<|message|>So."
        "<|channel|>final<|message|>It rains < or > it does not.\n<|return|>"
    )
    answer = read(HARMONY, text, range(len(text)))
    assert answer.reasoning == "I think.\nSo."
    assert answer.text == "I look.It rains < or > it does not.\n"
    assert answer.calls == [("weather", {"city": "x"})]


def test_an_answer_that_begins_inside_a_message(read: Read) -> None:
    assert HARMONY.opens_reasoning("<|start|>assistant<|channel|>analysis<|message|>")
    assert not HARMONY.opens_reasoning("<|start|>assistant")
    answer = read(HARMONY, "a<|end|><|start|>assistant<|channel|>final<|message|>b", reasoning_open=True)
    assert (answer.reasoning, answer.text) == ("a", "b")


@pytest.mark.parametrize(
    "text",
    [
        "Hello <|end|>",
        "<|channel|>secret<|message|>x",
        "<|channel|>final",
        "<|channel|>" + "x" * 300 + "<|message|>",
        "<|channel|>commentary to=python code<|message|>print(1)<|call|>",
        "<|channel|>commentary to=functions.weather<|message|>{bad}<|call|>",
        '<|channel|>commentary to=functions.weather<|message|>{"city": "x"',
        '<|channel|>commentary to=functions.weather<|message|>{"city": "x"} and more<|call|>',
        "to=functions.weather",
        " to=you",
    ],
)
def test_what_is_no_message_is_text(read: Read, text: str) -> None:
    for eager in (False, True):
        answer = read(HARMONY, text, range(len(text)), eager=eager)
        assert (answer.calls, answer.reasoning, answer.given_back) == ([], "", text)


def test_a_broken_header_inside_a_message_stays_in_it(read: Read) -> None:
    text = "<|channel|>analysis<|message|>about <|channel|>x<|message|> headers<|end|>"
    answer = read(HARMONY, text, range(len(text)))
    assert (answer.reasoning, answer.text) == ("about <|channel|>x<|message|> headers", "")
