"""What a conversation's next prompt will begin with, as far as that is known when an answer ends.

Templates render an answer that has become history otherwise than they let it begin (thoughts leave, white space is
trimmed), and its text may be encoded otherwise than the model wrote it.  So the tokens that were generated are not
what comes back: the conversation is rendered as it will be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashmoe.chat.dialects import Event, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallStart
from flashmoe.chat.llm import LLM
from flashmoe.chat.messages import Message

# Two texts that share no first character and no first token; of white space only what every template keeps is shared.
_EITHER, _OR = "a", "\n\nb"


@dataclass(frozen=True)
class Conversation:
    """What a prompt was rendered from."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None
    variables: Mapping[str, Any]


@dataclass
class Said:
    """An answer, put together from its events."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """The next one."""
        if isinstance(event, TextDelta):
            self.text += event.text
        elif isinstance(event, ReasoningDelta):
            self.reasoning += event.text
        elif isinstance(event, ToolCallStart):
            self.calls.append(tool_call(event))
        elif isinstance(event, ToolCallArguments):
            self.calls[event.index]["function"]["arguments"] += event.json_delta

    def message(self) -> dict[str, Any]:
        """As a client sends it back, its reasoning with it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        return message


def tool_call(start: ToolCallStart) -> dict[str, Any]:
    """A call as OpenAI's API has it, without its arguments yet."""
    return {"id": start.id, "type": "function", "function": {"name": start.name, "arguments": ""}}


def next_prefix(llm: LLM, conversation: Conversation, said: Said) -> list[int]:
    """The tokens that every next prompt shares: up to where the user's next message or the first tool result begins.

    Raises PromptError when the template refuses such a conversation.
    """
    first, second = (_encoded(llm, conversation, said, text) for text in (_EITHER, _OR))
    pairs = zip(first, second, strict=False)
    return first[: next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))]


def _encoded(llm: LLM, conversation: Conversation, said: Said, text: str) -> list[int]:
    following: list[dict[str, Any]] = [{"role": "user", "content": text}]
    if said.calls:
        following = [{"role": "tool", "tool_call_id": call["id"], "content": text} for call in said.calls]
    rendered = llm.chat_template.render(
        [*conversation.messages, said.message(), *following],
        tools=conversation.tools,
        **{**conversation.variables, "add_generation_prompt": False},
    )
    return llm.tokenizer.encode(rendered, add_special_tokens=False)
