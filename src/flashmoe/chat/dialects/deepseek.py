"""DeepSeek-V3.1, and the older form of V3 and R1.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
    ```json
    {...}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

Both are read, whichever the template has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from flashmoe.chat.dialects.base import NewId, Tool, read_tools
from flashmoe.chat.dialects.json_call import read_arguments
from flashmoe.chat.dialects.lark import LarkGrammar
from flashmoe.chat.dialects.parsing import ParserOptions
from flashmoe.chat.dialects.source import Step
from flashmoe.chat.dialects.tagged import TaggedParser, ends_inside

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_FENCE, _FENCE_END = "```json", "```"


@dataclass(frozen=True)
class DeepSeek:
    """See Dialect.  fenced: the older form, in which a grammar has to force calls."""

    fenced: bool = False
    name: ClassVar[str] = "deepseek"

    def parser(
        self,
        tools: Sequence[Tool] | None,
        reasoning_open: bool = False,
        *,
        eager: bool = False,
        new_id: NewId | None = None,
    ) -> DeepSeekParser:
        """See Dialect."""
        return DeepSeekParser(ParserOptions.of(tools, reasoning_open, eager, new_id))

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
        between = grammar.text("\n") if self.fenced else ""
        more = f"({between} call)*" if parallel else ""
        grammar.rule("start", f"{grammar.text(_CALLS)} call {more} {grammar.text(_CALLS_END)}")
        grammar.rule("call", " | ".join(f"call_{number}" for number in range(len(schemas))))
        for number, (name, schema) in enumerate(schemas.items()):
            before = f"function{_SEPARATOR}{name}\n{_FENCE}\n" if self.fenced else f"{name}{_SEPARATOR}"
            behind = f"\n{_FENCE_END}{_CALL_END}" if self.fenced else _CALL_END
            arguments = grammar.json(f"arguments_{number}", schema)
            grammar.rule(
                f"call_{number}", f"{grammar.text(_CALL + before)} {arguments} {grammar.text(behind)}"
            )
        return str(grammar)


class DeepSeekParser(TaggedParser):
    """See EventParser."""

    def __init__(self, options: ParserOptions) -> None:
        super().__init__(options, openers=(_CALLS, _CALL), closers=(_CALLS_END,))

    def _calls(self, opener: str) -> Step[None]:
        source = self.source
        if opener == _CALLS:
            yield from source.spaces()
            yield from source.expect(_CALL)
        yield from source.spaces()
        name = yield from source.name()  # in the older form the kind of tool, always "function"
        yield from source.expect(_SEPARATOR)
        yield from source.spaces()
        fenced = (yield from source.starts("{")) is None
        if fenced:
            name = yield from source.name()
            yield from source.spaces()
            yield from source.expect(_FENCE)
        self.draft.start(name)
        yield from read_arguments(source, self.draft)
        if fenced:
            yield from source.closing(_FENCE_END)
        yield from source.closing(_CALL_END)
        self.draft.end()
