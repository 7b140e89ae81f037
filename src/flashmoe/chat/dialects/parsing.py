"""What the parsers of all dialects share: events on their way out, and calls that may turn out to be none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashmoe.chat.dialects.base import (
    Event,
    NewId,
    ReasoningDelta,
    TextDelta,
    Tool,
    ToolCallAborted,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    openai_id,
    read_tools,
)
from flashmoe.chat.dialects.json_scan import Malformed
from flashmoe.chat.dialects.source import Source, Step

Emit = Callable[[str], None]


@dataclass(frozen=True)
class ParserOptions:
    """The arguments of Dialect.parser(), as the parsers keep them."""

    tools: Mapping[str, Mapping[str, Any]]
    reasoning_open: bool
    eager: bool
    new_id: NewId

    @classmethod
    def of(
        cls,
        tools: Sequence[Tool] | None,
        reasoning_open: bool,
        eager: bool,
        new_id: NewId | None,
        default_id: NewId = openai_id,
    ) -> ParserOptions:
        """Raises PromptError when a tool has no name."""
        return cls(read_tools(tools), reasoning_open, eager, new_id or default_id)


class CallDraft:
    """The events of calls that are being read: kept until they are certain, or passed on at once when eager."""

    def __init__(self, parser: DialectParser) -> None:
        self.mark = parser.source.position  # where the text of the current call begins
        self._parser = parser
        self._kept: list[Event] = []
        self._index = parser.calls
        self._announced = False

    def streams(self, name: str | None) -> bool:
        """Whether a call of this name is announced before it is complete: only when eager, and if it exists."""
        return self._parser.options.eager and name in self._parser.options.tools

    def start(self, name: str, call_id: str | None = None) -> None:
        """A call begins."""
        self._kept.append(ToolCallStart(self._index, call_id or self._parser.options.new_id(), name))
        self._announced = self.streams(name)
        if self._announced:
            self._parser.calls = self._index + 1
            self._pass_on()

    def arguments(self, piece: str) -> None:
        """The next piece of its arguments."""
        if piece:
            self._kept.append(ToolCallArguments(self._index, piece))
        if self._announced:
            self._pass_on()

    def end(self) -> None:
        """The call is complete."""
        self._kept.append(ToolCallEnd(self._index))
        self._index += 1
        if self._parser.options.eager:
            self.commit()
            self.mark = self._parser.source.position

    def commit(self) -> None:
        """Everything so far is certain."""
        self._announced = False
        self._parser.calls = self._index
        self._pass_on()

    def abort(self, raw_text: str) -> bool:
        """Whether a call that had been announced had to be taken back."""
        if self._announced:
            self._parser.emit(ToolCallAborted(self._index, raw_text))
        return self._announced

    def _pass_on(self) -> None:
        for event in self._kept:
            self._parser.emit(event)
        self._kept.clear()


class DialectParser(ABC):
    """Drives the reading of one answer (_run) and collects its events.  Not thread-safe."""

    def __init__(self, options: ParserOptions) -> None:
        self.options = options
        self.source = Source()
        self.calls = 0
        self.draft = CallDraft(self)
        self._events: list[Event] = []
        self._steps = self._run()

    def push(self, text_delta: str) -> list[Event]:
        """See EventParser."""
        if self.source.ended:
            raise ValueError("this answer has been finished: make a parser for the next one")
        self.source.text += text_delta
        return self._advance()

    def finish(self) -> list[Event]:
        """See EventParser."""
        self.source.ended = True
        return self._advance()

    def emit(self, event: Event) -> None:
        """Hand an event out with the piece of text that is being read; pieces of one thing become one."""
        joined = _joined(self._events[-1], event) if self._events else None
        if joined is None:
            self._events.append(event)
        else:
            self._events[-1] = joined

    def emit_text(self, text: str) -> None:
        """Hand out text for the user."""
        if text:
            self.emit(TextDelta(text))

    def emit_reasoning(self, text: str) -> None:
        """Hand out reasoning."""
        if text:
            self.emit(ReasoningDelta(text))

    @abstractmethod
    def _run(self) -> Step[None]:
        """Read the whole answer."""

    def _passage(self, markers: tuple[str, ...], emit: Emit) -> Step[tuple[int, str] | None]:
        """Emit text up to the white space before the first marker: (the marker's position, itself); None at the end."""
        source = self.source
        while True:
            found = source.find(markers)
            if found is not None:
                before = source.text[source.position : found[0]]
                emit(source.take(source.position + len(before.rstrip())))
                return found
            if source.ended or not markers:
                emit(source.take(len(source.text)))
            else:
                emit(source.take(source.settled(markers)))
            if source.ended:
                return None
            source.forget()
            yield

    def _attempt(self, reading: Step[None], emit: Emit) -> Step[bool]:
        """Read calls, from the present position; whether there were any.

        What is malformed is emitted as text up to where it stopped to be a call, and reading goes on there: a call that
        follows is found, and no text is read twice, however often a model begins a call that it does not end.
        """
        draft = self.draft = CallDraft(self)
        try:
            yield from reading
        except Malformed:
            raw_text = self.source.text[draft.mark : self.source.position]
            if not draft.abort(raw_text):
                emit(raw_text)
            return False
        draft.commit()
        return True

    def _advance(self) -> list[Event]:
        next(self._steps, None)
        events, self._events = self._events, []
        return events


def _joined(before: Event, event: Event) -> Event | None:
    """Both as one event, if they are pieces of the same thing."""
    match before, event:
        case TextDelta(first), TextDelta(second):
            return TextDelta(first + second)
        case ReasoningDelta(first), ReasoningDelta(second):
            return ReasoningDelta(first + second)
        case ToolCallArguments(index, first), ToolCallArguments(same, second) if index == same:
            return ToolCallArguments(index, first + second)
    return None
