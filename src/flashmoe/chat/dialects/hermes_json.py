"""Hermes, Qwen2.5 and Qwen3: one JSON object between tags.

<tool_call>
{"name": NAME, "arguments": {...}}
</tool_call>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from flashmoe.chat.dialects.base import NewId, Tool, read_tools
from flashmoe.chat.dialects.json_call import read_call
from flashmoe.chat.dialects.lark import LarkGrammar, alternatives, call_object_rules
from flashmoe.chat.dialects.parsing import ParserOptions
from flashmoe.chat.dialects.source import Step
from flashmoe.chat.dialects.tagged import TaggedParser, ends_inside

_CALL, _CALL_END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class HermesJson:
    """See Dialect."""

    name: ClassVar[str] = "hermes_json"

    def parser(
        self,
        tools: Sequence[Tool] | None,
        reasoning_open: bool = False,
        *,
        eager: bool = False,
        new_id: NewId | None = None,
    ) -> HermesJsonParser:
        """See Dialect."""
        return HermesJsonParser(ParserOptions.of(tools, reasoning_open, eager, new_id))

    def opens_reasoning(self, prompt: str) -> bool:
        """See Dialect."""
        return ends_inside(prompt)

    def call_grammar(
        self, tools: Sequence[Tool], *, parallel: bool = True, token_ids: Mapping[str, int] | None = None
    ) -> str | None:
        """See Dialect."""
        schemas = read_tools(tools)
        if not schemas:
            return None
        grammar = LarkGrammar(token_ids)
        newline = grammar.text("\n")
        grammar.rule("start", f"call ({newline} call)*" if parallel else "call")
        calls = alternatives(call_object_rules(grammar, schemas))
        grammar.rule("call", f"{grammar.text(_CALL)} {newline} {calls} {newline} {grammar.text(_CALL_END)}")
        return str(grammar)


class HermesJsonParser(TaggedParser):
    """See EventParser."""

    def __init__(self, options: ParserOptions) -> None:
        super().__init__(options, openers=(_CALL,))

    def _calls(self, opener: str) -> Step[None]:
        yield from self.source.spaces()
        yield from read_call(self.source, self.draft)
        yield from self.source.closing(_CALL_END)
        self.draft.end()
