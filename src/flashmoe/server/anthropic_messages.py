"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from flashmoe.chat.dialects import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from flashmoe.chat.prompts import Prompt
from flashmoe.chat.structured import StructuredOutput
from flashmoe.engine.params import SamplingParams
from flashmoe.errors import FlashmoeError
from flashmoe.server.anthropic_types import (
    CountRequest,
    MessagesRequest,
    conversation,
    tool_choice_of,
    tools_of,
    variables_of,
)
from flashmoe.server.problems import anthropic_error
from flashmoe.server.service import AnswerEvent, Began, Done, Service
from flashmoe.server.streaming import Events, event_stream, named, unless_left
from flashmoe.server.tool_choice import choose_tools

router = APIRouter()


@dataclass(frozen=True)
class Ask:
    """A request made ready."""

    prompt: Prompt
    params: SamplingParams
    structured: StructuredOutput | None
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex[:24]}")


@router.post("/v1/messages")
async def messages(body: MessagesRequest, request: Request) -> Response:
    """An answer to a conversation, whole or as a stream."""
    service: Service = request.app.state.service
    ask = await _prepare(service, body)
    if body.stream:
        return await event_stream(_stream(service, ask), _error_event)
    return JSONResponse(await unless_left(request, _whole(service, ask)))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, request: Request) -> dict[str, int]:
    """How long the prompt of a conversation is."""
    service: Service = request.app.state.service
    return {"input_tokens": len((await _prompt(service, body))[0].ids)}


async def _prompt(service: Service, body: CountRequest) -> tuple[Prompt, bool, bool]:
    choice, parallel = tool_choice_of(body)
    tools, forced = choose_tools(tools_of(body), choice)
    prompt = await service.chat_prompt(conversation(body), tools, variables_of(body))
    return prompt, forced, parallel


async def _prepare(service: Service, body: MessagesRequest) -> Ask:
    prompt, forced, parallel = await _prompt(service, body)
    given = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "max_tokens")}
    params = service.llm.sampling_params(**given, stop=tuple(body.stop_sequences))
    return Ask(prompt, params, service.prompts.tool_structure(prompt, None, forced, parallel))


async def _whole(service: Service, ask: Ask) -> dict[str, Any]:
    blocks = _Blocks()
    content: list[dict[str, Any]] = []
    done = None
    async for event in service.answer(ask.prompt, ask.params, ask.structured):
        if isinstance(event, Done):
            done = event
        for change in blocks.changes(event):
            _apply(content, change)
    assert done is not None
    for block in content:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("partial") or "{}")
    return _message(service, ask, content) | {
        "stop_reason": _stop_reason(done, blocks.calls),
        "stop_sequence": done.stop_text,
        "usage": _usage(done),
    }


def _apply(content: list[dict[str, Any]], change: dict[str, Any]) -> None:
    """A change of a stream, done to the whole."""
    if change["type"] == "content_block_start":
        block = change["content_block"]
        content.append(block | {"partial": ""} if block["type"] == "tool_use" else block)
    elif change["type"] == "content_block_delta":
        delta = dict(change["delta"])
        kind = delta.pop("type")
        if kind == "input_json_delta":
            content[change["index"]]["partial"] += delta["partial_json"]
        elif kind != "signature_delta":
            for key, text in delta.items():
                content[change["index"]][key] += text


async def _stream(service: Service, ask: Ask) -> Events:
    answer = service.answer(ask.prompt, ask.params, ask.structured)
    blocks = _Blocks()
    try:
        async for event in answer:
            if isinstance(event, Began):  # only now is it certain that the answer can begin
                start = _message(service, ask, []) | {"stop_reason": None, "stop_sequence": None}
                usage = {"input_tokens": len(ask.prompt.ids), "output_tokens": 0}
                yield named({"type": "message_start", "message": start | {"usage": usage}})
                yield named({"type": "ping"})
            for change in blocks.changes(event):
                yield named(change)
            if isinstance(event, Done):
                ending = {"stop_reason": _stop_reason(event, blocks.calls), "stop_sequence": event.stop_text}
                yield named({"type": "message_delta", "delta": ending, "usage": _usage(event)})
                yield named({"type": "message_stop"})
    finally:
        await answer.aclose()


class _Blocks:
    """Turns events into the changes of content blocks, of which one is open at a time."""

    def __init__(self) -> None:
        self._index, self._open, self.calls = -1, "", False

    def changes(self, event: AnswerEvent) -> list[dict[str, Any]]:
        if isinstance(event, TextDelta):
            return [
                *self._in("text", {"type": "text", "text": ""}),
                self._delta("text_delta", text=event.text),
            ]
        if isinstance(event, ReasoningDelta):
            block = {"type": "thinking", "thinking": "", "signature": ""}
            return [*self._in("thinking", block), self._delta("thinking_delta", thinking=event.text)]
        if isinstance(event, ToolCallStart):
            self.calls = True
            call = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
            return [*self._close(), *self._in("tool_use", call)]
        if isinstance(event, ToolCallArguments):
            return [self._delta("input_json_delta", partial_json=event.json_delta)]
        return self._close() if isinstance(event, ToolCallEnd | Done) else []

    def _in(self, kind: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        if self._open == kind:
            return []
        closed = self._close()
        self._index += 1
        self._open = kind
        return [*closed, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _delta(self, kind: str, **text: str) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, **text}}

    def _close(self) -> list[dict[str, Any]]:
        if not self._open:
            return []
        self._open = ""
        return [{"type": "content_block_stop", "index": self._index}]


def _message(service: Service, ask: Ask, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": ask.id, "type": "message", "role": "assistant", "model": service.name, "content": content}


def _stop_reason(done: Done, calls: bool) -> str:
    if done.reason == "length":
        return "max_tokens"
    if done.stop_text is not None:
        return "stop_sequence"
    return "tool_use" if calls else "end_turn"


def _usage(done: Done) -> dict[str, int]:
    return {
        "input_tokens": done.prompt_tokens - done.cached_tokens,
        "cache_read_input_tokens": done.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": done.completion_tokens,
    }


def _error_event(error: FlashmoeError) -> bytes:
    return named(anthropic_error(500, " ".join(str(error).split())))
