"""Qwen3.5 and Qwen3-Coder: parameters as plain text between tags.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

One newline on either side of a value belongs to the format.  The schema says what a value is; see schema.py.  A closing
tag inside a value is part of it unless another tag follows, so markup and even this format can be written to a file.
Accepted besides: a call of a known tool without <tool_call>, several functions in one <tool_call>, a value whose
</parameter> is missing before the next known parameter or the end of the function, and a call inside the reasoning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from flashmoe.chat.dialects.base import NewId, Tool, read_tools
from flashmoe.chat.dialects.json_scan import Malformed
from flashmoe.chat.dialects.lark import LarkGrammar, alternatives
from flashmoe.chat.dialects.parsing import Emit, ParserOptions
from flashmoe.chat.dialects.schema import json_from_text, parameter_types
from flashmoe.chat.dialects.source import Step
from flashmoe.chat.dialects.tagged import TaggedParser, ends_inside

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_STRING = frozenset({"string"})


@dataclass(frozen=True)
class QwenXml:
    """See Dialect."""

    name: ClassVar[str] = "qwen_xml"

    def parser(
        self,
        tools: Sequence[Tool] | None,
        reasoning_open: bool = False,
        *,
        eager: bool = False,
        new_id: NewId | None = None,
    ) -> QwenXmlParser:
        """See Dialect."""
        return QwenXmlParser(ParserOptions.of(tools, reasoning_open, eager, new_id))

    def opens_reasoning(self, prompt: str) -> bool:
        """See Dialect."""
        return ends_inside(prompt)

    def call_grammar(
        self, tools: Sequence[Tool], *, parallel: bool = True, token_ids: Mapping[str, int] | None = None
    ) -> str | None:
        """See Dialect.  Parameters stand in the order of the schema; optional ones may be missing."""
        schemas = read_tools(tools)
        if not schemas:
            return None
        grammar = LarkGrammar(token_ids)
        more = f" ({grammar.text(chr(10))} call)*" if parallel else ""
        grammar.rule("start", "call" + more)
        functions = [
            _function_rule(grammar, n, name, schema) for n, (name, schema) in enumerate(schemas.items())
        ]
        grammar.rule(
            "call",
            f"{grammar.text(f'{_CALL}{chr(10)}{_FUNCTION}')} {alternatives(functions)} "
            + grammar.text(f"{_FUNCTION_END}\n{_CALL_END}"),
        )
        grammar.rule("text", r"/(?s:.*)\n<\/parameter>\n/", "lazy")
        return str(grammar)


class QwenXmlParser(TaggedParser):
    """See EventParser."""

    def __init__(self, options: ParserOptions) -> None:
        super().__init__(options, openers=(_CALL, _FUNCTION), calls_end_reasoning=True)

    def _calls(self, opener: str) -> Step[None]:
        source = self.source
        wrapped = opener == _CALL
        if wrapped:
            yield from source.spaces()
            yield from source.expect(_FUNCTION)
        last = yield from self._function(sure=wrapped and not self.reasoning)
        while wrapped and last == _FUNCTION_END:
            yield from source.spaces()
            if (yield from source.accept(_FUNCTION)) is None:
                yield from source.closing(_CALL_END)
                break
            self.draft.end()
            last = yield from self._function(sure=True)
        self.draft.end()

    def _function(self, sure: bool) -> Step[str]:
        """Read NAME> to the tag that ends the function, and return that tag.

        Unless ``sure`` that this is a call, and not talk about one, the function must exist.
        """
        source = self.source
        name = yield from source.name()
        yield from source.expect(">")
        if not sure and name not in self.options.tools:
            raise Malformed
        self.draft.start(name)
        self.draft.arguments("{")
        schema = self.options.tools.get(name, {})
        given: set[str] = set()
        while True:
            yield from source.spaces()
            tag = yield from source.expect(_PARAMETER, _FUNCTION_END, _CALL_END)
            if tag != _PARAMETER:
                self.draft.arguments("}")
                return tag
            yield from self._parameter(schema, given)

    def _parameter(self, schema: Mapping[str, Any], given: set[str]) -> Step[None]:
        source, draft = self.source, self.draft
        key = yield from source.until(">")
        draft.arguments((", " if given else "") + json.dumps(key, ensure_ascii=False) + ": ")
        given.add(key)
        properties = _properties(schema)
        types = parameter_types(properties.get(key), schema)
        next_tags = tuple(f"{_PARAMETER}{name}>" for name in properties if name not in given)
        yield from source.accept("\n")
        if types <= _STRING:
            draft.arguments('"')
            yield from self._value(
                next_tags, lambda text: draft.arguments(json.dumps(text, ensure_ascii=False)[1:-1])
            )
            draft.arguments('"')
        else:
            pieces: list[str] = []
            yield from self._value(next_tags, pieces.append)
            draft.arguments(json_from_text("".join(pieces), types))

    def _value(self, next_tags: tuple[str, ...], emit: Emit) -> Step[None]:
        """Emit the value's text and read its closing tag, if it has one."""
        source = self.source
        newline = ""  # not emitted before it is known to be no part of the format
        while True:
            tag = source.text.find("<", source.position)
            text = newline + source.take(tag if tag >= 0 else len(source.text))
            newline = "\n" if text.endswith("\n") else ""
            emit(text.removesuffix("\n"))
            if tag < 0:
                yield from source.more()
            elif (yield from self._value_ends(next_tags if newline else ())):
                return
            else:
                emit(newline + source.take(source.position + 1))
                newline = ""

    def _value_ends(self, next_tags: tuple[str, ...]) -> Step[bool]:
        """Whether the tag here ends the value; a </parameter> that does is read."""
        source = self.source
        mark = source.position
        tag = yield from source.accept(_PARAMETER_END, _FUNCTION_END, *next_tags)
        if tag == _PARAMETER_END:
            behind = source.position
            yield from source.spaces()
            if (yield from source.starts(_PARAMETER, _FUNCTION_END, _CALL_END)) is not None:
                source.position = behind
                return True
        elif tag == _FUNCTION_END:
            yield from source.spaces()
            if (yield from source.starts(_CALL_END)) is not None or source.at_end(_CALL_END):
                source.position = mark
                return True
        source.position = mark
        return tag in next_tags


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _function_rule(grammar: LarkGrammar, number: int, name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required") or ()
    items = [grammar.text(name + ">\n")]
    for at, (key, property_schema) in enumerate(_properties(schema).items()):
        opening = grammar.text(f"{_PARAMETER}{key}>\n")
        value = _value_rule(grammar, f"f{number}_p{at}", property_schema, schema)
        items.append(f"{opening} {value}" if key in required else f"({opening} {value})?")
    return grammar.rule(f"f{number}", " ".join(items))


def _value_rule(grammar: LarkGrammar, rule: str, schema: Any, root: Mapping[str, Any]) -> str:
    """The items of a value and its closing tag."""
    closing = grammar.text(f"\n{_PARAMETER_END}\n")
    choices = schema.get("enum") if isinstance(schema, Mapping) else None
    types = parameter_types(schema, root)
    if types == _STRING and isinstance(choices, list) and choices:
        return f"{alternatives([grammar.text(str(choice)) for choice in choices])} {closing}"
    if not types or "string" in types:
        return "text"
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return f"{grammar.json(rule, {**shared, **schema})} {closing}"
