"""Requests of OpenAI's Responses API, and their items in the form of chat messages, which templates know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flashmoe.chat.llm import LLM
from flashmoe.chat.structured import StructuredOutput
from flashmoe.engine.params import SamplingParams
from flashmoe.errors import RequestError
from flashmoe.server.openai_types import MOST_LOGPROBS
from flashmoe.server.openai_types import response_format as form_of

Item = dict[str, Any]
Find = Callable[[str], Item | None]

_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


class PromptRequest(BaseModel):
    """What decides the prompt: POST /v1/responses/input_tokens; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    input: str | list[Any] = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    conversation: Any = None
    prompt: Any = None


class ResponsesRequest(PromptRequest):
    """POST /v1/responses.  top_k, min_p, seed and the penalties are additions of this server."""

    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    include: list[str] | None = None
    store: bool | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    background: Literal[False] | None = None

    def params(self, llm: LLM) -> SamplingParams:
        """The model's defaults with what the request gives.  Raises ConfigError."""
        given = {name: getattr(self, name) for name in _SAMPLING}
        seed = None if self.seed is None else self.seed % (1 << 64)
        return llm.sampling_params(**given, seed=seed, max_tokens=self.max_output_tokens)

    @property
    def wanted_logprobs(self) -> int | None:
        """How many likely tokens come with each; None for no log-probabilities."""
        if self.top_logprobs is None and "message.output_text.logprobs" not in (self.include or ()):
            return None
        return self.top_logprobs or 0


def items_of(request: PromptRequest, find: Find) -> list[Item]:
    """The request's input as items; references become what `find` knows by their id.  Raises RequestError."""
    for name in ("conversation", "prompt"):
        if getattr(request, name) is not None:
            raise RequestError(f"{name} is not supported: send the items themselves as input", name)
    if isinstance(request.input, str):
        content = [{"type": "input_text", "text": request.input}]
        return [{"type": "message", "role": "user", "content": content}] if request.input else []
    items = []
    for number, item in enumerate(request.input):
        if not isinstance(item, dict):
            raise RequestError(
                f"input[{number}] is no object: write items like OpenAI's API has them", "input"
            )
        if item.get("type") == "item_reference":
            known = find(str(item.get("id")))
            if known is None:
                raise RequestError(
                    f"input[{number}] refers to {item.get('id')!r}, which is not known", "input"
                )
            item = known
        items.append(item)
    return items


def conversation(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The items as chat messages: what the assistant did in one turn becomes one message.  Raises RequestError."""
    messages = _Messages()
    if instructions:
        messages.add("system", instructions)
    for number, item in enumerate(items):
        where, kind = f"input[{number}]", item.get("type", "message")
        if kind == "message":
            _message(messages, item, where)
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            messages.assistant("reasoning_content", _text(parts, where))
        elif kind == "function_call":
            messages.call(_call(item, where))
        elif kind == "function_call_output":
            messages.add("tool", _text(item.get("output"), where), tool_call_id=item.get("call_id"))
        else:
            raise RequestError(
                f"{where} is of type {kind!r}: messages, reasoning, function_call and function_call_output are read",
                "input",
            )
    if not messages.all:
        raise RequestError("input is missing: give a text or a list of items", "input")
    return messages.all


class _Messages:
    """Puts what the assistant did between two messages of others into one."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def add(self, role: str, text: str, **more: Any) -> None:
        """A message of anybody else.  Instructions at the beginning are one message: templates want no second one."""
        if role == "developer" or role == "system":
            if len(self.all) == 1 and self.all[0]["role"] == "system":
                self.all[0]["content"] += "\n\n" + text
                return
            role = "system"
        self.all.append({"role": role, "content": text, **more})

    def assistant(self, key: str, text: str) -> None:
        """More of the assistant's reasoning or of its answer; they come before its calls."""
        message = self._open()
        if message.get("tool_calls") or (message["content"] and key == "reasoning_content"):
            self.all.append(message := {"role": "assistant", "content": ""})
        message[key] = message.get(key, "") + text

    def call(self, call: dict[str, Any]) -> None:
        """A call of the assistant's."""
        self._open().setdefault("tool_calls", []).append(call)

    def _open(self) -> dict[str, Any]:
        if not self.all or self.all[-1]["role"] != "assistant":
            self.all.append({"role": "assistant", "content": ""})
        return self.all[-1]


def _message(messages: _Messages, item: Item, where: str) -> None:
    role, text = item.get("role"), _text(item.get("content"), where)
    if role == "assistant":
        messages.assistant("content", text)
    elif role in ("user", "system", "developer"):
        messages.add(role, text)
    else:
        raise RequestError(
            f"{where}.role must be user, assistant, system or developer, not {role!r}", "input"
        )


def _call(item: Item, where: str) -> dict[str, Any]:
    name, arguments = item.get("name"), item.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise RequestError(f"{where} is a function_call without a name or without arguments", "input")
    return {
        "id": item.get("call_id"),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if not isinstance(text, str) or kind not in (*_TEXT_PARTS, "refusal"):
            raise RequestError(f"{where} has a part that is no text ({kind}): only text can be read", "input")
        texts.append(text)
    return "".join(texts)


def tools_of(request: PromptRequest) -> tuple[list[dict[str, Any]] | None, str | dict[str, Any] | None]:
    """(the tools in the chat API's form, its tool_choice).  Raises RequestError."""
    tools: list[dict[str, Any]] = []
    for number, tool in enumerate(request.tools or ()):
        if tool.get("type") != "function":
            raise RequestError(
                f"tools[{number}] is of type {tool.get('type')!r}: only functions are supported", "tools"
            )
        keys = ("name", "description", "parameters", "strict")
        function = {key: tool[key] for key in keys if tool.get(key) is not None}
        tools.append({"type": "function", "function": function})
    choice = request.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        listed = choice.get("tools")
        allowed = (
            [one.get("name") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        )
        tools = [tool for tool in tools if tool["function"].get("name") in allowed]
        choice = str(choice.get("mode", "auto"))
    return tools or None, choice


def structure_of(request: PromptRequest) -> StructuredOutput | None:
    """The form that the answer must have.  Raises RequestError, StructureError."""
    form = (request.text or {}).get("format")
    if form is not None and not isinstance(form, dict):
        raise RequestError("text.format must be an object with a type", "text.format")
    if form is not None and form.get("type") == "json_schema":  # the chat API has the same a level deeper
        form = {"type": "json_schema", "json_schema": form}
    return form_of(form, "text.format")


def variables_of(request: PromptRequest) -> dict[str, Any]:
    """The template's variables: whether to think, and how hard."""
    variables = dict(request.chat_template_kwargs or {})
    effort = (request.reasoning or {}).get("effort")
    if effort is not None:
        variables.setdefault("enable_thinking", effort not in ("none", "minimal"))
        variables.setdefault("reasoning_effort", effort)
    return variables
