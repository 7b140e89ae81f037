"""How the tests of all dialects write calls and read an answer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from flashmoe.chat.dialects.deepseek import DeepSeek
from flashmoe.chat.dialects.harmony import Harmony
from flashmoe.chat.dialects.hermes_json import HermesJson
from flashmoe.chat.dialects.mistral import Mistral
from flashmoe.chat.dialects.qwen_xml import QwenXml

Calls = list[tuple[str, Mapping[str, Any]]]

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


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def qwen_xml(calls: Calls) -> str:
    def written(value: object) -> str:
        return dumps(value) if isinstance(value, dict | list) else str(value)

    def parameters(arguments: Mapping[str, Any]) -> str:
        return "".join(f"<parameter={k}>\n{written(v)}\n</parameter>\n" for k, v in arguments.items())

    return "\n".join(
        f"<tool_call>\n<function={name}>\n{parameters(arguments)}</function>\n</tool_call>"
        for name, arguments in calls
    )


def hermes_json(calls: Calls) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {dumps(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    )


def deepseek(calls: Calls) -> str:
    written = "".join(
        f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{dumps(a)}<｜tool▁call▁end｜>" for n, a in calls
    )
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def deepseek_fenced(calls: Calls) -> str:
    written = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{n}\n```json\n{dumps(a)}\n```<｜tool▁call▁end｜>"
        for n, a in calls
    )
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def harmony(calls: Calls) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumps(arguments)}<|call|>"
        for name, arguments in calls
    )


def mistral(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{dumps(arguments)}" for name, arguments in calls)


def mistral_listed(calls: Calls) -> str:
    return "[TOOL_CALLS] " + dumps([{"name": name, "arguments": arguments} for name, arguments in calls])


@dataclass(frozen=True)
class Form:
    """A dialect, how its calls are written, and what it is confused with."""

    dialect: Dialect
    write: Callable[[Calls], str]
    markers: tuple[str, ...]


_TAGS = ("<tool_call>", "</tool_call>")
FORMS = {
    "qwen_xml": Form(
        QwenXml(),
        qwen_xml,
        (*_TAGS, "<function=weather>", "</function>", "<parameter=city>", "<parameter=days>", "</parameter>"),
    ),
    "hermes_json": Form(HermesJson(), hermes_json, (*_TAGS, '"name": "weather"', '"arguments": ')),
    "deepseek": Form(
        DeepSeek(),
        deepseek,
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>weather", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    ),
    "deepseek_fenced": Form(
        DeepSeek(fenced=True),
        deepseek_fenced,
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "weather\n```json", "```", "<｜tool▁calls▁end｜>"),
    ),
    "harmony": Form(
        Harmony(),
        harmony,
        (
            "<|channel|>analysis",
            "<|start|>assistant",
            " to=functions.weather",
            "<|message|>",
            "<|call|>",
            "<|end|>",
        ),
    ),
    "mistral": Form(
        Mistral(), mistral, ("[TOOL_CALLS]", "weather", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]")
    ),
    "mistral_listed": Form(
        Mistral(listed=True), mistral_listed, ("[TOOL_CALLS]", "[", "]", '"name": "weather"')
    ),
}


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


@pytest.fixture(scope="session", params=FORMS.values(), ids=FORMS.keys())
def form(request: pytest.FixtureRequest) -> Any:
    """Each dialect in each of its forms, with a function that writes calls."""
    return request.param


@pytest.fixture(scope="session")
def forms() -> dict[str, Form]:
    return FORMS
