"""POST /v1/responses and what belongs to it: OpenAI's Responses API."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from flashmoe.chat.prompts import Prompt
from flashmoe.chat.structured import StructuredOutput
from flashmoe.engine.params import SamplingParams
from flashmoe.errors import FlashmoeError, RequestError
from flashmoe.server.responses_store import ResponseStore, Stored
from flashmoe.server.responses_stream import Output
from flashmoe.server.responses_types import (
    Item,
    PromptRequest,
    ResponsesRequest,
    conversation,
    items_of,
    structure_of,
    tools_of,
    variables_of,
)
from flashmoe.server.service import Began, Done, Service
from flashmoe.server.streaming import Events, event_stream, named, unless_left
from flashmoe.server.tool_choice import choose_tools

router = APIRouter()


@dataclass(frozen=True)
class Ask:
    """A request made ready.  before: the items of the conversation that it continues."""

    request: ResponsesRequest
    before: list[Item]
    items: list[Item]
    prompt: Prompt
    params: SamplingParams
    structured: StructuredOutput | None
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created_at: int = field(default_factory=lambda: int(time.time()))


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """An answer, whole or as a stream."""
    service: Service = request.app.state.service
    store: ResponseStore = request.app.state.responses
    before, items = _items(store, body)
    params = body.params(service.llm)
    prompt, structured = await _prompt(service, body, [*before, *items])
    answer = _Answer(service, store, Ask(body, before, items, prompt, params, structured))
    if body.stream:
        return await event_stream(answer.stream(), answer.failed)
    return JSONResponse(await unless_left(request, answer.whole()))


@router.post("/v1/responses/input_tokens")
async def input_tokens(body: PromptRequest, request: Request) -> dict[str, Any]:
    """How long the prompt of a request would be."""
    before, items = _items(request.app.state.responses, body)
    prompt, _ = await _prompt(request.app.state.service, body, [*before, *items])
    return {"object": "response.input_tokens", "input_tokens": len(prompt.ids)}


@router.get("/v1/responses/{name}")
async def retrieve(name: str, request: Request) -> dict[str, Any]:
    """A stored response."""
    return _stored(request, name).response


@router.get("/v1/responses/{name}/input_items")
async def input_items(name: str, request: Request, order: str = "desc") -> dict[str, Any]:
    """What a stored response was asked, the newest first unless order is asc."""
    items = [{"id": f"{name}_{i}"} | item for i, item in enumerate(_stored(request, name).own_input)]
    if order != "asc":
        items.reverse()
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": False}


@router.delete("/v1/responses/{name}")
async def delete(name: str, request: Request) -> dict[str, Any]:
    """Forget a stored response."""
    if not request.app.state.responses.delete(name):
        raise HTTPException(404)
    return {"id": name, "object": "response", "deleted": True}


def _stored(request: Request, name: str) -> Stored:
    stored: Stored | None = request.app.state.responses.get(name)
    if stored is None:
        raise HTTPException(404)
    return stored


def _items(store: ResponseStore, body: PromptRequest) -> tuple[list[Item], list[Item]]:
    """(the conversation so far, the request's own items)."""
    before: list[Item] = []
    if body.previous_response_id is not None:
        stored = store.get(body.previous_response_id)
        if stored is None:
            raise RequestError(
                f"Previous response with id {body.previous_response_id!r} not found: send the conversation as input",
                "previous_response_id",
                "previous_response_not_found",
            )
        before = stored.history
    return before, items_of(body, store.item)


async def _prompt(
    service: Service, body: PromptRequest, items: list[Item]
) -> tuple[Prompt, StructuredOutput | None]:
    tools, forced = choose_tools(*tools_of(body))
    messages = conversation(body.instructions, items)
    structured = structure_of(body)
    prompt = await service.chat_prompt(messages, tools, variables_of(body))
    parallel = body.parallel_tool_calls is not False
    return prompt, service.prompts.tool_structure(prompt, structured, forced, parallel)


class _Answer:
    """One response on its way."""

    def __init__(self, service: Service, store: ResponseStore, ask: Ask) -> None:
        self._service, self._store, self._ask = service, store, ask
        self._output = Output(ask.request.wanted_logprobs is not None)
        self._sequence = 0

    async def whole(self) -> dict[str, Any]:
        """The finished response."""
        ask, done = self._ask, None
        logprobs = ask.request.wanted_logprobs
        async for event in self._service.answer(ask.prompt, ask.params, ask.structured, logprobs):
            self._output.changes(event)
            if isinstance(event, Done):
                done = event
        assert done is not None
        return self._finished(done)

    async def stream(self) -> Events:
        """Its events; the last one carries the finished response."""
        ask = self._ask
        logprobs = ask.request.wanted_logprobs
        answer = self._service.answer(ask.prompt, ask.params, ask.structured, logprobs)
        try:
            async for event in answer:
                if isinstance(event, Began):  # only now is it certain that the answer can begin
                    for kind in ("created", "in_progress"):
                        yield self._event(
                            {"type": f"response.{kind}", "response": self._frame("in_progress")}
                        )
                for change in self._output.changes(event):
                    yield self._event(change)
                if isinstance(event, Done):
                    response = self._finished(event)
                    yield self._event({"type": f"response.{response['status']}", "response": response})
        finally:
            await answer.aclose()

    def failed(self, error: FlashmoeError) -> bytes:
        """The last event of a response that went wrong after it had begun."""
        cause = {"code": "server_error", "message": " ".join(str(error).split())}
        response = self._frame("failed") | {"error": cause}
        return self._event({"type": "response.failed", "response": response})

    def _event(self, change: dict[str, Any]) -> bytes:
        self._sequence += 1
        return named(change | {"sequence_number": self._sequence - 1})

    def _finished(self, done: Done) -> dict[str, Any]:
        status = "completed" if done.reason == "stop" else "incomplete"
        response = self._frame(status) | {"usage": _usage(done)}
        if status == "completed":
            response["completed_at"] = int(time.time())
        else:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if response["store"]:
            self._store.put(response, self._ask.before, self._ask.items)
        return response

    def _frame(self, status: str) -> dict[str, Any]:
        """The response as it is now."""
        ask, request = self._ask, self._ask.request
        return {
            "id": ask.id,
            "object": "response",
            "created_at": ask.created_at,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._service.name,
            "output": self._output.items if status != "in_progress" else [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": None, "summary": None} | (request.reasoning or {}),
            "store": request.store is not False,
            "temperature": ask.params.temperature,
            "text": {"format": {"type": "text"}} | (request.text or {}),
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": ask.params.top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _usage(done: Done) -> dict[str, Any]:
    return {
        "input_tokens": done.prompt_tokens,
        "input_tokens_details": {"cached_tokens": done.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": done.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": done.reasoning_tokens},
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }
