"""What a tool dialect is: the way one family of models writes its tool calls and its reasoning.

A dialect turns the text of an answer, piece by piece, into events.  The text must be decoded with special tokens
kept, because several dialects write their markers as special tokens; the token that ends the answer is no part of it.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flashmoe.errors import PromptError

Tool = Mapping[str, Any]
NewId = Callable[[], str]

_ID_CHARACTERS = string.ascii_letters + string.digits
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class TextDelta:
    """The next piece of the answer that the user reads."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """The next piece of the model's reasoning."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call begins: its number in the answer (from 0), an id for the result to refer to, the function's name."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """The next piece of a call's arguments; all pieces of a call together are one JSON object."""

    index: int
    json_delta: str


@dataclass(frozen=True)
class ToolCallEnd:
    """The call is complete and may be carried out."""

    index: int


@dataclass(frozen=True)
class ToolCallAborted:
    """Only when eager: a call that had been announced turned out malformed or cut, and must not be carried out.

    raw_text is what the model wrote for it, from the white space before its first marker on.
    """

    index: int
    raw_text: str


Event = TextDelta | ReasoningDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | ToolCallAborted


class EventParser(Protocol):
    """One answer on its way from text to events.  Not thread-safe."""

    def push(self, text_delta: str) -> list[Event]:
        """The events that became certain with this piece of text; how the text is cut never changes their sum."""

    def finish(self) -> list[Event]:
        """The rest, when the answer has ended.  Text held back comes out; a call that was cut comes out as text."""


class Dialect(Protocol):
    """How one family of models writes calls and reasoning.  Immutable, so safe to share between threads."""

    @property
    def name(self) -> str:
        """The name of the dialect's file."""

    def parser(
        self,
        tools: Sequence[Tool] | None,
        reasoning_open: bool = False,
        *,
        eager: bool = False,
        new_id: NewId | None = None,
    ) -> EventParser:
        """A parser for one answer.

        tools: the functions that the model was told of, in OpenAI's form or as bare {"name", "parameters"}.  Their
        schemas decide what a parameter's text means where the dialect has no types.  Without tools markers of calls are
        text.  A function that is not among them is still reported: the caller answers that it does not exist, from
        which models recover.
        reasoning_open: the prompt ended inside the reasoning (opens_reasoning(prompt) tells).
        eager: announce a call and send its arguments while they come.  Otherwise a call's events come together when it
        is complete, so that one which is malformed or cut can come out as text instead.
        new_id: makes the ids of calls; random when None.
        Raises PromptError when a tool has no name.
        """

    def opens_reasoning(self, prompt: str) -> bool:
        """Whether the answer to this rendered prompt begins inside the reasoning."""

    def call_grammar(
        self, tools: Sequence[Tool], *, parallel: bool = True, token_ids: Mapping[str, int] | None = None
    ) -> str | None:
        """What the model must write, from the end of its reasoning to the end of its turn, to call one of the tools.

        The text is a grammar in llguidance's variant of Lark; None when there are no tools.  parallel permits several
        calls.  token_ids has the markers that are special tokens of the tokenizer; other markers are plain text.
        """


def read_tools(tools: Sequence[Tool] | None) -> dict[str, Mapping[str, Any]]:
    """Schemas of the parameters by name of the function.  Raises PromptError when a tool has no name."""
    named = {}
    for number, tool in enumerate(tools or ()):
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise PromptError(f"tools[{number}] has no function name: write it like OpenAI's API has it")
        parameters = function.get("parameters") or function.get("input_schema")
        named[name] = parameters if isinstance(parameters, Mapping) else _NO_PARAMETERS
    return named


def openai_id() -> str:
    """An id of OpenAI's form."""
    return "call_" + random_id(24)


def random_id(length: int) -> str:
    """So many random letters and digits."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(length))
