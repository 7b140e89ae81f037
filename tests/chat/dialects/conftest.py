"""How the tests of all dialects read an answer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from flashmoe.chat.dialects import (
    Dialect,
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallAborted,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "share": {"type": "number"},
        "exact": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "options": {"type": "object"},
        "note": {"type": ["string", "null"]},
    },
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]


@dataclass
class Answer:
    """What an answer amounts to; calls are (name, arguments)."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    given_back: str = ""  # text and taken-back calls, in their order
    aborted: list[str] = field(default_factory=list)


def joined(events: Iterable[Event]) -> Answer:
    """The sum of events, which must come in a proper order."""
    answer, arguments, open_call = Answer(), "", None
    for event in events:
        match event:
            case TextDelta(text):
                assert open_call is None
                answer.text += text
                answer.given_back += text
            case ReasoningDelta(text):
                assert open_call is None
                answer.reasoning += text
            case ToolCallStart(index, call_id, name):
                assert (open_call, index) == (None, len(answer.calls) + len(answer.aborted))
                open_call, arguments = (index, name), ""
                answer.ids.append(call_id)
            case ToolCallArguments(index, piece):
                assert open_call is not None
                assert open_call[0] == index
                arguments += piece
            case ToolCallEnd(index):
                assert open_call is not None
                assert open_call[0] == index
                value = json.loads(arguments)
                assert isinstance(value, dict)
                answer.calls.append((open_call[1], value))
                open_call = None
            case ToolCallAborted(index, raw_text):
                assert open_call is not None
                assert open_call[0] == index
                answer.aborted.append(raw_text)
                answer.given_back += raw_text
                open_call = None
    assert open_call is None
    return answer


def read_answer(
    dialect: Dialect,
    text: str,
    cuts: Sequence[int] = (),
    *,
    tools: Sequence[Any] | None = TOOLS,
    **options: Any,
) -> Answer:
    """Push the text, cut at the given places, through the dialect's parser."""
    numbers = itertools.count()
    parser = dialect.parser(tools, new_id=lambda: f"id{next(numbers)}", **options)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    events = [event for a, b in itertools.pairwise(places) for event in parser.push(text[a:b])]
    return joined(events + parser.finish())


@pytest.fixture(scope="session")
def read() -> Callable[..., Answer]:
    return read_answer


@pytest.fixture(scope="session")
def join() -> Callable[..., Answer]:
    return joined


@pytest.fixture(scope="session")
def tools() -> list[dict[str, Any]]:
    """weather(city, days, share, exact, tags, options, note) and now()."""
    return TOOLS
