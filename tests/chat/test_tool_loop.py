"""Turns with tools, over a scripted model."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from typing import Any

import pytest

from flashmoe.chat.dialects import ReasoningDelta, TextDelta, ToolCallArguments, ToolCallEnd, ToolCallStart
from flashmoe.chat.session import AnswerEnd, AnswerEvent, Reading
from flashmoe.chat.tool_loop import ToolResult, ToolStarted, TurnEvent, take_turn
from flashmoe.chat.toolbox import Toolboxes
from flashmoe.chat.transcript import Transcript
from flashmoe.errors import ReadError, ToolError

END = AnswerEnd("stop", 10, 0, 5, 0.1, 1.0, None, 0)


def say(text: str) -> list[AnswerEvent]:
    return [Reading(5, 10), *(TextDelta(char) for char in text), END]


def call(*calls: tuple[str, str], text: str = "") -> list[AnswerEvent]:
    events: list[AnswerEvent] = [ReasoningDelta("hm"), TextDelta(text)] if text else []
    for index, (name, arguments) in enumerate(calls):
        events += [
            ToolCallStart(index, f"call_{index}", name),
            ToolCallArguments(index, arguments),
            ToolCallEnd(index),
        ]
    return [*events, END]


class Model:
    """Says what is in its script, and remembers what it was asked."""

    def __init__(self, *script: list[AnswerEvent]) -> None:
        self.script, self.asked, self.closed = list(script), [], 0
        self.first: list[bool] = []

    def __call__(self, messages: Sequence[dict[str, Any]], first: bool) -> Generator[AnswerEvent, None, None]:
        self.asked.append(json.loads(json.dumps(messages)))
        self.first.append(first)
        try:
            for event in self.script.pop(0):
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.closed += 1


class Calculator:
    """Adds; fails; interrupts."""

    tools = [  # noqa: RUF012
        {"type": "function", "function": {"name": name, "parameters": {}}} for name in ("add", "fail", "stop")
    ]

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        self.calls.append((name, arguments))
        if name == "fail":
            raise ToolError("out of order")
        if name == "stop":
            raise KeyboardInterrupt
        return str(arguments["a"] + arguments["b"])


@pytest.fixture
def transcript() -> Transcript:
    return Transcript([{"role": "user", "content": "2 and 3?"}])


def turn(transcript: Transcript, model: Model, box: Calculator, rounds: int = 4) -> list[TurnEvent]:
    return list(take_turn(transcript, model, Toolboxes([box], 1000), rounds))


def valid(transcript: Transcript) -> bool:
    """Whether every call has exactly one result, right behind it."""
    wanted: list[str] = []
    for message in transcript.messages:
        if message["role"] == "tool":
            if not wanted or message["tool_call_id"] != wanted.pop(0):
                return False
        elif wanted:
            return False
        wanted += [call["id"] for call in message.get("tool_calls", ())]
    return not wanted


def test_an_answer_without_calls(transcript: Transcript) -> None:
    model = Model(say("five"))
    events = turn(transcript, model, Calculator())
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "five"
    assert events[-1] is END
    assert transcript.messages[1:] == [{"role": "assistant", "content": "five"}]


def test_results_go_back_to_the_model(transcript: Transcript) -> None:
    model, box = Model(call(("add", '{"a": 2, "b": 3}'), text="I add."), say("five")), Calculator()
    events = turn(transcript, model, box)
    assert box.calls == [("add", {"a": 2, "b": 3})]
    assert ToolStarted("add", '{"a": 2, "b": 3}') in events
    assert ToolResult("add", "5", failed=False) in events
    assert model.asked[1][1]["reasoning_content"] == "hm"
    assert model.asked[1][2] == {"role": "tool", "tool_call_id": "call_0", "name": "add", "content": "5"}
    assert transcript.messages[-1]["content"] == "five"
    assert model.first == [True, False]
    assert valid(transcript)


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("fail", "{}", "error: out of order"),
        ("none", "{}", "error: there is no tool 'none'; there are: add, fail, stop"),
        ("add", "[1]", "error: the arguments are no JSON object"),
        ("add", "{", "error: the arguments are no JSON"),
    ],
)
def test_errors_are_results(transcript: Transcript, name: str, arguments: str, result: str) -> None:
    model = Model(call((name, arguments), ("add", '{"a": 1, "b": 1}')), say("sorry"))
    events = turn(transcript, model, Calculator())
    (failed, done) = [event for event in events if isinstance(event, ToolResult)]
    assert failed.failed
    assert failed.text.startswith(result)
    assert done == ToolResult("add", "2", failed=False)
    assert transcript.messages[-1]["content"] == "sorry"
    assert valid(transcript)


def test_rounds_have_a_limit_and_the_model_is_told(transcript: Transcript) -> None:
    add = call(("add", '{"a": 1, "b": 1}'))
    model, box = Model(add, add, add, say("enough")), Calculator()
    turn(transcript, model, box, rounds=2)
    assert len(box.calls) == 2
    assert "limit of 2 rounds" in model.asked[3][-1]["content"]
    assert transcript.messages[-1]["content"] == "enough"
    assert valid(transcript)


def test_a_model_that_never_stops_calling_is_stopped(transcript: Transcript) -> None:
    add = call(("add", '{"a": 1, "b": 1}'))
    model, box = Model(*[add] * 9), Calculator()
    turn(transcript, model, box, rounds=2)
    assert len(box.calls) == 2
    assert len(model.asked) == 4
    assert valid(transcript)


def test_an_interrupted_answer_keeps_what_was_said(transcript: Transcript) -> None:
    model = Model(say("five is the answer"))
    events = take_turn(transcript, model, Toolboxes([], 10), 3)
    for _ in range(6):
        next(events)
    events.close()
    assert transcript.messages[1:] == [{"role": "assistant", "content": "five "}]
    assert model.closed == 1


@pytest.mark.parametrize("events_taken", range(12))
def test_wherever_a_turn_ends_it_can_go_on(transcript: Transcript, events_taken: int) -> None:
    add = ("add", '{"a": 1, "b": 1}')
    model = Model(call(add, add, text="I add."), say("two"))
    events = take_turn(transcript, model, Toolboxes([Calculator()], 100), 3)
    for _, _ in zip(range(events_taken), events, strict=False):
        pass
    events.close()
    assert valid(transcript)
    assert model.closed == len(model.asked)


def test_an_interrupted_tool_has_a_result(transcript: Transcript) -> None:
    model = Model(call(("stop", "{}"), ("add", '{"a": 1, "b": 1}')))
    with pytest.raises(KeyboardInterrupt):
        turn(transcript, model, Calculator())
    results = [message["content"] for message in transcript.messages if message["role"] == "tool"]
    assert results == ["not carried out: the user interrupted"] * 2
    assert valid(transcript)


def test_a_failed_answer_keeps_what_was_said(transcript: Transcript) -> None:
    broken: Any = [TextDelta("fi"), ReadError("the drive is gone")]
    with pytest.raises(ReadError):
        turn(transcript, Model(broken), Calculator())
    assert transcript.messages[-1]["content"] == "fi"
