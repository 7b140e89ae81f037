"""Requests of Anthropic's Messages API, and their conversations in the form of OpenAI's, which templates know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from flashmoe.errors import RequestError

Block = dict[str, Any]


class CountRequest(BaseModel):
    """POST /v1/messages/count_tokens; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: str | list[Block] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] = Field(default_factory=list)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool = False


def conversation(request: CountRequest) -> list[dict[str, Any]]:
    """The messages as OpenAI writes them: tool results as messages of their own.  Raises RequestError."""
    system = _text(request.system, "system") if request.system else ""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for number, message in enumerate(request.messages):
        messages += _converted(message, f"messages.{number}")
    return messages


def tools_of(request: CountRequest) -> list[dict[str, Any]] | None:
    """The tools in OpenAI's form.  Raises RequestError."""
    tools = []
    for number, tool in enumerate(request.tools or ()):
        if tool.get("type", "custom") != "custom":
            raise RequestError(
                f"tools.{number}: {tool['type']!r} is not supported: only custom tools are", "tools"
            )
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema") or {}}
        extra = {key: tool[key] for key in ("description", "strict") if key in tool}
        tools.append({"type": "function", "function": function | extra})
    return tools or None


def tool_choice_of(request: CountRequest) -> tuple[str | dict[str, Any] | None, bool]:
    """(OpenAI's tool_choice, whether several calls are welcome).  Raises RequestError."""
    choice = request.tool_choice or {}
    kind, parallel = choice.get("type", "auto"), not choice.get("disable_parallel_tool_use", False)
    if kind == "tool":
        return {"function": {"name": choice.get("name")}}, parallel
    names = {"auto": None, "any": "required", "none": "none"}
    if kind not in names:
        raise RequestError(
            f"tool_choice.type {kind!r} is unknown: use auto, any, tool or none", "tool_choice"
        )
    return names[kind], parallel


def variables_of(request: CountRequest) -> dict[str, Any]:
    """The template's variables: whether to think."""
    if request.thinking is None:
        return {}
    return {"enable_thinking": request.thinking.get("type") == "enabled"}


def _converted(message: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise RequestError(f"{where}.role must be user or assistant, not {role!r}", "messages")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise RequestError(f"{where}.content must be a text or a list of blocks", "messages")
    if role == "assistant":
        yield _assistant(content, where)
        return
    for block in content:
        if block.get("type") == "tool_result":
            text = _text(block.get("content") or "", where)
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}
    rest = [block for block in content if block.get("type") != "tool_result"]
    if rest:
        yield {"role": "user", "content": _text(rest, where)}


def _assistant(content: list[Block], where: str) -> dict[str, Any]:
    """One message of the assistant; thoughts go where templates look for them."""
    message: dict[str, Any] = {"role": "assistant"}
    known = ("thinking", "redacted_thinking", "tool_use")
    message["content"] = _text([block for block in content if block.get("type") not in known], where)
    thoughts = [block.get("thinking") for block in content if block.get("type") == "thinking"]
    if thoughts:
        message["reasoning_content"] = "".join(text for text in thoughts if isinstance(text, str))
    calls = [_call(block, where) for block in content if block.get("type") == "tool_use"]
    return message | ({"tool_calls": calls} if calls else {})


def _call(block: Block, where: str) -> dict[str, Any]:
    name, arguments = block.get("name"), block.get("input", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise RequestError(
            f"{where} has a tool_use without a name or with an input that is no object", "messages"
        )
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": block.get("id"), "type": "function", "function": function}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for block in content if isinstance(content, list) else [content]:
        text = block.get("text") if isinstance(block, dict) and block.get("type") == "text" else None
        if not isinstance(text, str):
            kind = block.get("type") if isinstance(block, dict) else type(block).__name__
            raise RequestError(
                f"{where} has a block that is no text ({kind}): only text can be read", "messages"
            )
        texts.append(text)
    return "".join(texts)
