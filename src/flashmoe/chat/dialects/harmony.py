"""gpt-oss: messages on channels.

    <|channel|>analysis<|message|>reasoning<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>
    <|start|>assistant<|channel|>final<|message|>text<|return|>

analysis is reasoning; final, and commentary to nobody, are text.  The recipient may stand before the channel, too, and
the answer begins behind "<|start|>assistant".  The token that ends an answer is usually no part of the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from flashmoe.chat.dialects.base import NewId, Tool, read_tools
from flashmoe.chat.dialects.json_call import read_arguments
from flashmoe.chat.dialects.json_scan import Malformed
from flashmoe.chat.dialects.lark import LarkGrammar, alternatives
from flashmoe.chat.dialects.parsing import DialectParser, Emit, ParserOptions
from flashmoe.chat.dialects.source import Step

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_HEADS = (_START, _CHANNEL)
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_REASONING_OPEN = f"{_CHANNEL}analysis{_MESSAGE}"
_NAMESPACE = "functions."
_HEADER = re.compile(
    r"(?:<\|start\|>assistant)?(?: ?to=(?P<before>[^\s<]+))?"
    r"(?:<\|channel\|>(?P<channel>analysis|commentary|final)(?: to=(?P<behind>[^\s<]+))?)?"
    r"(?: ?<\|constrain\|>\w+| \w+)?\s*"
)


@dataclass(frozen=True)
class Harmony:
    """See Dialect."""

    name: ClassVar[str] = "harmony"

    def parser(
        self,
        tools: Sequence[Tool] | None,
        reasoning_open: bool = False,
        *,
        eager: bool = False,
        new_id: NewId | None = None,
    ) -> HarmonyParser:
        """See Dialect."""
        return HarmonyParser(ParserOptions.of(tools, reasoning_open, eager, new_id))

    def opens_reasoning(self, prompt: str) -> bool:
        """See Dialect."""
        return prompt.endswith(_REASONING_OPEN)

    def call_grammar(
        self, tools: Sequence[Tool], *, parallel: bool = True, token_ids: Mapping[str, int] | None = None
    ) -> str | None:
        """See Dialect.  The models were trained to make one call at a time, so ``parallel`` changes nothing.

        The message may begin with <|start|>assistant, as it does behind reasoning, or with its channel.
        """
        schemas = read_tools(tools)
        if not schemas:
            return None
        grammar = LarkGrammar(token_ids)
        calls = alternatives(
            [
                f"{grammar.text(f'{name} <|constrain|>json{_MESSAGE}')} {grammar.json(f'arguments_{number}', schema)}"
                for number, (name, schema) in enumerate(schemas.items())
            ]
        )
        start = grammar.text(f"{_START}assistant")
        head = grammar.text(f"{_CHANNEL}commentary to={_NAMESPACE}")
        grammar.rule("start", f"({start})? {head} {calls} {grammar.text('<|call|>')}")
        return str(grammar)


class HarmonyParser(DialectParser):
    """See EventParser."""

    def __init__(self, options: ParserOptions) -> None:
        super().__init__(options)
        self._inside = options.reasoning_open  # a message has begun and not ended
        self._body: Emit = self.emit_reasoning if options.reasoning_open else self.emit_text

    def _run(self) -> Step[None]:
        source = self.source
        if not self._inside and (yield from source.starts(" to=", "to=")) is not None:
            yield from self._attempt(self._message(), self.emit_text)
        while True:
            markers = (*_HEADS, *_ENDS) if self._inside else _HEADS
            found = yield from self._passage(markers, self._body)
            if found is None:
                return
            at, marker = found
            self._body(source.take(at))
            if marker in _ENDS:
                source.take(at + len(marker))
                self._leave()
            else:
                yield from self._attempt(self._head(marker), self._body)

    def _leave(self) -> None:
        self._inside, self._body = False, self.emit_text

    def _head(self, marker: str) -> Step[None]:
        self.source.take(self.source.position + len(marker))
        yield from self._message(marker)

    def _message(self, begun: str = "") -> Step[None]:
        """Read a header and, where it is a call, the whole message.  Raises Malformed."""
        header = _HEADER.fullmatch(begun + (yield from self.source.until(_MESSAGE)))
        if header is None:
            raise Malformed
        recipient = header["before"] or header["behind"]
        if recipient is not None:
            yield from self._call(recipient)
            self._leave()
            return
        self._inside = True
        self._body = self.emit_reasoning if header["channel"] == "analysis" else self.emit_text

    def _call(self, recipient: str) -> Step[None]:
        source, tools = self.source, self.options.tools
        name = recipient.removeprefix(_NAMESPACE)
        if not tools or (name == recipient and name not in tools):
            raise Malformed  # a built-in tool, of which we have none
        self.draft.start(name)
        yield from read_arguments(source, self.draft)
        yield from source.spaces()
        if (yield from source.starts(_START)) is None:
            yield from source.closing(*_ENDS)
        self.draft.end()
