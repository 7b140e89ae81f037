"""One turn of a conversation: an answer, the calls in it, their results, the next answer, until one calls nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from flashmoe.chat.continuation import Said
from flashmoe.chat.session import AnswerEnd, AnswerEvent, Reading
from flashmoe.chat.toolbox import Toolbox
from flashmoe.chat.transcript import Transcript
from flashmoe.errors import ToolError

_INTERRUPTED = "not carried out: the user interrupted"


@dataclass(frozen=True)
class ToolStarted:
    """A call is about to be carried out."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolResult:
    """What a call gave; `failed` when that is an error."""

    name: str
    text: str
    failed: bool


TurnEvent = AnswerEvent | ToolStarted | ToolResult
# The answer to the messages; the flag: it is the first of its turn.
Answer = Callable[[Sequence[dict[str, Any]], bool], Generator[AnswerEvent, None, None]]


def take_turn(
    transcript: Transcript, answer: Answer, toolbox: Toolbox, most_rounds: int
) -> Generator[TurnEvent, None, None]:
    """Answer the transcript's last message; the transcript grows by all that is said and done.

    After `most_rounds` answers with calls no call is carried out any more, and the model is told so.  Errors of tools
    are results for the model.  Whenever the turn ends, be it by closing the iterator or by an exception in it, the
    transcript is one that can go on: what was said is in it, and every call has a result.
    Raises what `answer` raises.
    """
    for number in range(most_rounds + 2):
        said, finished = Said(), False
        try:
            with closing(answer(transcript.messages, number == 0)) as events:
                for event in events:
                    if not isinstance(event, AnswerEnd | Reading):
                        said.add(event)
                    yield event
            finished = True
        finally:
            transcript.hear(said)
            if not finished:
                _refuse(transcript, said.calls, _INTERRUPTED)
        if not said.calls:
            return
        if number < most_rounds:
            yield from _carry_out(transcript, said.calls, toolbox)
        else:
            reason = f"not carried out: the limit of {most_rounds} rounds of calls is reached, answer without tools"
            _refuse(transcript, said.calls, reason)
            yield ToolResult(said.calls[0]["function"]["name"], reason, failed=True)


def _carry_out(
    transcript: Transcript, calls: list[dict[str, Any]], toolbox: Toolbox
) -> Generator[TurnEvent, None, None]:
    waiting = list(calls)
    try:
        while waiting:
            function = waiting[0]["function"]
            yield ToolStarted(function["name"], function["arguments"])
            text, failed = _call(toolbox, function["name"], function["arguments"])
            transcript.result(waiting.pop(0)["id"], function["name"], text)
            yield ToolResult(function["name"], text, failed)
    finally:
        _refuse(transcript, waiting, _INTERRUPTED)


def _call(toolbox: Toolbox, name: str, arguments: str) -> tuple[str, bool]:
    try:
        given = json.loads(arguments or "{}")
        if not isinstance(given, dict):
            raise ToolError("the arguments are no JSON object")
        return toolbox.call(name, given), False
    except ValueError as error:
        return f"error: the arguments are no JSON: {error}", True
    except ToolError as error:
        return f"error: {error.text}", True


def _refuse(transcript: Transcript, calls: list[dict[str, Any]], reason: str) -> None:
    for call in calls:
        transcript.result(call["id"], call["function"]["name"], reason)
