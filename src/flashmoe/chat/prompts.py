"""Conversations to prompts, and what is needed to read the answers to them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashmoe.chat.continuation import Conversation
from flashmoe.chat.dialects import Event, PlainParser, TextDelta, detect
from flashmoe.chat.dialects.base import Dialect, EventParser
from flashmoe.chat.llm import LLM
from flashmoe.chat.messages import Message
from flashmoe.chat.structured import StructuredOutput
from flashmoe.errors import FlashmoeError, PromptError

_RENDER_ARGUMENTS = {"self", "messages", "tools", "add_generation_prompt"}
_THINK_END = "</think>"

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to be processed.

    snapshot_at: see Generation.  tools: those that the answer may call.  reasoning_open: the answer begins inside the
    reasoning.  parse: split reasoning and tool calls out of the answer.  conversation: that it was rendered from.
    """

    ids: list[int]
    snapshot_at: tuple[int, ...] = ()
    tools: Tools | None = None
    reasoning_open: bool = False
    parse: bool = True
    conversation: Conversation | None = None

    def after_reasoning(self, structured: StructuredOutput) -> StructuredOutput:
        """A form that begins where the reasoning ends, if the answer begins with reasoning."""
        if self.reasoning_open and structured.after is None:
            return structured.begin_after(_THINK_END)
        return structured


class Prompts:
    """Of one model.  Thread-safe."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        try:
            self.dialect: Dialect | None = detect(llm.chat_template.source)
        except FlashmoeError:  # without a template there are no conversations, but completions
            self.dialect = None

    def render(
        self, messages: Sequence[Message], tools: Tools | None, variables: Mapping[str, Any]
    ) -> Prompt:
        """The prompt of a conversation; variables are the template's own.  Raises PromptError or BundleError."""
        for name in sorted(_RENDER_ARGUMENTS & variables.keys()):
            raise PromptError(f"the template's variable {name} cannot be set: the request has a field for it")
        text = self._llm.chat_template.render(messages, tools=tools, **variables)
        ids = self._llm.tokenizer.encode(text, add_special_tokens=False)
        boundaries = {
            self._shared(ids, earlier, tools, variables) for earlier in (messages, messages[:-1]) if earlier
        }
        return Prompt(
            ids,
            tuple(sorted(at for at in boundaries if 0 < at < len(ids))),
            tools,
            self.dialect.opens_reasoning(text) if self.dialect else text.rstrip().endswith("<think>"),
            conversation=Conversation(messages, tools, variables),
        )

    def parser(self, prompt: Prompt) -> EventParser:
        """Reads the answer to a prompt."""
        if not prompt.parse:
            return _Verbatim()
        if self.dialect is None:
            return PlainParser(prompt.reasoning_open)
        return self.dialect.parser(prompt.tools, prompt.reasoning_open)

    def tool_structure(
        self, prompt: Prompt, structured: StructuredOutput | None, forced: bool, parallel: bool = True
    ) -> StructuredOutput | None:
        """The form of an answer that must call one of the prompt's tools, or whose calls must follow their schemas.

        structured: the form that is wanted otherwise.  Raises PromptError when both are asked for, or a call cannot be
        forced with this model.
        """
        if not forced and (structured is not None or not strict_tools(prompt.tools)):
            return structured
        if structured is not None:
            raise PromptError(
                "an answer cannot be a forced tool call and have a form of its own: ask for one of them"
            )
        grammar, markers = None, self._llm.tokenizer.added_tokens
        if self.dialect is not None and prompt.tools:
            grammar = self.dialect.call_grammar(prompt.tools, parallel=parallel, token_ids=markers)
        if grammar is None:
            raise PromptError(
                "this model's chat template has no tool calls that could be forced: use tool_choice auto"
            )
        return StructuredOutput.lark(grammar if forced else _text_before(grammar, markers))

    def _shared(
        self,
        ids: list[int],
        messages: Sequence[Message],
        tools: Tools | None,
        variables: Mapping[str, Any],
    ) -> int:
        """How many tokens the prompt shares with the conversation up to these messages, so with what continues it."""
        try:
            text = self._llm.chat_template.render(
                messages, tools=tools, **{**variables, "add_generation_prompt": False}
            )
        except PromptError:  # some templates refuse a conversation that does not end with the user
            return 0
        known = self._llm.tokenizer.encode(text, add_special_tokens=False)
        return next(
            (i for i, (a, b) in enumerate(zip(ids, known, strict=False)) if a != b), min(len(ids), len(known))
        )


def strict_tools(tools: Tools | None) -> bool:
    """Whether a tool asks that its calls follow its schema."""
    return any((tool.get("function") or tool).get("strict") for tool in tools or ())


class _Verbatim:
    """Everything is text."""

    def push(self, text_delta: str) -> list[Event]:
        return [TextDelta(text_delta)] if text_delta else []

    def finish(self) -> list[Event]:
        return []


def _text_before(grammar: str, markers: dict[str, int]) -> str:
    """The grammar of calls with free text before them, or nothing else than text.  Raises PromptError.

    Calls must begin with a token of their own: the lexer then knows where the text ends.
    """
    opening = re.search(r"^start: (?:call\b(?s:.*?)^call: )?<\[(\d+)\]>", grammar, re.MULTILINE)
    if opening is None:
        raise PromptError(
            "with this model strict tools are possible only as forced calls: use tool_choice required"
        )
    marker = next(text for text, token_id in markers.items() if token_id == int(opening[1]))
    # The first pattern is for llguidance, which otherwise takes only a part of the second one for the operand of "~".
    text = f"/(?s:.*)/ & ~/(?s:.*){re.escape(marker).replace('/', chr(92) + '/')}(?s:.*)/"
    renamed = re.sub(r"^start:", "calls:", grammar, count=1, flags=re.MULTILINE)
    return f"start: ANYTHING? calls?\nANYTHING: {text}\n{renamed}"
