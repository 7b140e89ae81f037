"""Mistral: a list of JSON objects, or since 2025 a name and its arguments.

    [TOOL_CALLS] [{"name": NAME, "arguments": {...}}, ...]
    [TOOL_CALLS]NAME[ARGS]{...}[TOOL_CALLS]NAME[CALL_ID]ID[ARGS]{...}

Both are read, whichever the template has.  Reasoning stands between [THINK] and [/THINK]; the first models that reason
wrote <think> instead, which the template tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from flashmoe.chat.dialects.base import NewId, Tool, random_id, read_tools
from flashmoe.chat.dialects.json_call import read_arguments, read_call
from flashmoe.chat.dialects.lark import LarkGrammar, alternatives, call_object_rules
from flashmoe.chat.dialects.parsing import ParserOptions
from flashmoe.chat.dialects.source import Step
from flashmoe.chat.dialects.tagged import TaggedParser, ThinkTags, ends_inside

_CALLS, _ARGUMENTS, _CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
BRACKETS: ThinkTags = ("[THINK]", "[/THINK]")


@dataclass(frozen=True)
class Mistral:
    """See Dialect.  listed: the older form, in which a grammar has to force calls."""

    listed: bool = False
    think: ThinkTags = BRACKETS
    name: ClassVar[str] = "mistral"

    def parser(
        self,
        tools: Sequence[Tool] | None,
        reasoning_open: bool = False,
        *,
        eager: bool = False,
        new_id: NewId | None = None,
    ) -> MistralParser:
        """See Dialect.  The ids have nine characters, because Mistral's templates refuse others."""
        options = ParserOptions.of(tools, reasoning_open, eager, new_id, default_id=lambda: random_id(9))
        return MistralParser(options, self.think)

    def opens_reasoning(self, prompt: str) -> bool:
        """See Dialect."""
        return ends_inside(prompt, self.think)

    def call_grammar(
        self, tools: Sequence[Tool], *, parallel: bool = True, token_ids: Mapping[str, int] | None = None
    ) -> str | None:
        """See Dialect."""
        schemas = read_tools(tools)
        if not schemas:
            return None
        grammar = LarkGrammar(token_ids)
        if self.listed:
            calls = alternatives(call_object_rules(grammar, schemas))
            more = f"({grammar.text(', ')} {calls})*" if parallel else ""
            grammar.rule("start", f"{grammar.text(_CALLS + ' [')} {calls} {more} {grammar.text(']')}")
            return str(grammar)
        grammar.rule("start", "call+" if parallel else "call")
        calls = alternatives(
            [
                f"{grammar.text(name + _ARGUMENTS)} {grammar.json(f'arguments_{number}', schema)}"
                for number, (name, schema) in enumerate(schemas.items())
            ]
        )
        grammar.rule("call", f"{grammar.text(_CALLS)} {calls}")
        return str(grammar)


class MistralParser(TaggedParser):
    """See EventParser."""

    def __init__(self, options: ParserOptions, think: ThinkTags) -> None:
        super().__init__(options, openers=(_CALLS,), think=think)

    def _calls(self, opener: str) -> Step[None]:
        source, draft = self.source, self.draft
        yield from source.spaces()
        if (yield from source.accept("[")) is None:
            yield from self._named_call()
            return
        separator = ","
        while separator == ",":
            yield from source.spaces()
            yield from read_call(source, draft)
            yield from source.spaces()
            if source.at_end("]"):  # the last bracket is cut off where it is taken for a stop token
                separator = "]"
            else:
                separator = yield from source.expect(",", "]")
            draft.end()

    def _named_call(self) -> Step[None]:
        source, call_id = self.source, None
        name = yield from source.name()
        if (yield from source.accept(_CALL_ID)) is not None:
            call_id = yield from source.name()
        yield from source.accept(_ARGUMENTS)  # absent where it was decoded without special tokens
        self.draft.start(name, call_id)
        yield from read_arguments(source, self.draft)
        self.draft.end()
