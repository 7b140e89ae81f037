"""Conversations as OpenAI's API has them, in the form that chat templates want."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flashmoe.errors import PromptError

Message = Mapping[str, Any]

# What some servers and clients call a message's reasoning_content.
_REASONING = ("reasoning_content", "reasoning")


def normalize_messages(
    messages: Sequence[Message], *, developer_role: bool = False, reasoning_key: str = "reasoning_content"
) -> list[dict[str, Any]]:
    """Copies of the messages, as templates walk through them; the given ones stay as they are.

    Arguments of earlier tool calls that are JSON text become mappings; a content of several text parts becomes one
    text, and a missing one the empty text; what else a message has (name, tool_call_id, ...) is kept.
    developer_role: the template has that role; otherwise its messages become system messages.
    reasoning_key: what the template calls reasoning_content.
    Raises PromptError for a message without a role, arguments that are no JSON object, and parts that are no text.
    """
    return [
        _normalized(message, number, developer_role, reasoning_key) for number, message in enumerate(messages)
    ]


def _normalized(message: Message, number: int, developer_role: bool, reasoning_key: str) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise PromptError(
            f'messages[{number}] has no role: write it like {{"role": "user", "content": "..."}}'
        )
    normalized = dict(message)
    if role == "developer" and not developer_role:
        normalized["role"] = "system"
    normalized["content"] = _content(message.get("content"), number)
    reasoning = next((message[key] for key in _REASONING if isinstance(message.get(key), str)), None)
    if reasoning is not None:
        normalized.setdefault(reasoning_key, reasoning)
    calls = normalized.pop("tool_calls", None)
    if calls:
        given = calls if isinstance(calls, Sequence) else (None,)
        normalized["tool_calls"] = [_tool_call(call, number) for call in given]
    return normalized


def _content(content: object, number: int) -> object:
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    return "".join(_part(part, number) for part in content)


def _part(part: object, number: int) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise PromptError(
            f"messages[{number}] has a part that is no text ({kind}): only text can be read, leave it out"
        )
    return text


def _tool_call(call: object, number: int) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise PromptError(
            f"messages[{number}] has a tool call that is no object: write it like OpenAI's API has it"
        )
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(
            f"messages[{number}] has a tool call without a name: write it like OpenAI's API has it"
        )
    if "arguments" not in function:
        return dict(call)
    decoded = {**function, "arguments": _arguments(function["arguments"], function["name"])}
    return {**call, "function": decoded} if "function" in call else decoded


def _arguments(arguments: object, name: str) -> object:
    if arguments is None:
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise PromptError(f"the arguments of the tool call {name!r} are no JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise PromptError(f"the arguments of the tool call {name!r} are no JSON object: {arguments!r}")
    return arguments
