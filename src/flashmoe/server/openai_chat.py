"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from flashmoe.chat.continuation import Said, tool_call
from flashmoe.chat.dialects import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
)
from flashmoe.chat.prompts import Prompt
from flashmoe.chat.structured import StructuredOutput
from flashmoe.engine.params import SamplingParams
from flashmoe.errors import FlashmoeError, RequestError
from flashmoe.server.openai_types import ChatRequest, structure_of
from flashmoe.server.problems import openai_error
from flashmoe.server.service import AnswerEvent, Began, Done, Service, TokenText, with_seed
from flashmoe.server.streaming import Events, data, event_stream, merged, unless_left
from flashmoe.server.tool_choice import choose_tools

router = APIRouter()


@dataclass(frozen=True)
class Ask:
    """A request made ready."""

    request: ChatRequest
    prompt: Prompt
    params: SamplingParams
    structured: StructuredOutput | None
    top_logprobs: int | None
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, service: Service, index: int) -> AsyncGenerator[AnswerEvent, None]:
        """The index-th of the wanted answers."""
        params = with_seed(self.params, index)
        return service.answer(self.prompt, params, self.structured, self.top_logprobs)


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """An answer to a conversation, whole or as a stream."""
    service: Service = request.app.state.service
    ask = await _prepare(service, body)
    if body.stream:
        return await event_stream(_stream(service, ask), _error_event)
    return JSONResponse(await unless_left(request, _whole(service, ask)))


async def _prepare(service: Service, body: ChatRequest) -> Ask:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    params = body.params(service.llm, body.max_completion_tokens)
    structured = structure_of(body)
    tools, forced = choose_tools(body.tools, body.tool_choice)
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("enable_thinking", body.reasoning_effort not in ("none", "minimal"))
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    prompt = await service.chat_prompt(body.messages, tools, variables)
    structured = service.prompts.tool_structure(prompt, structured, forced, body.parallel_tool_calls)
    top = (body.top_logprobs or 0) if body.logprobs else None
    return Ask(body, prompt, params, structured, top)


async def _whole(service: Service, ask: Ask) -> dict[str, Any]:
    results = await asyncio.gather(*(_choice(service, ask, i) for i in range(ask.request.n)))
    return {
        "id": ask.id,
        "object": "chat.completion",
        "created": ask.created,
        "model": service.name,
        "choices": [choice for choice, _ in results],
        "usage": usage_of([done for _, done in results]),
    }


async def _choice(service: Service, ask: Ask, index: int) -> tuple[dict[str, Any], Done]:
    collected = Collected()
    async for event in ask.answer(service, index):
        collected.add(event)
    assert collected.done is not None
    choice = {
        "index": index,
        "message": collected.message(),
        "logprobs": {"content": collected.logprobs, "refusal": None}
        if ask.top_logprobs is not None
        else None,
        "finish_reason": collected.finish_reason,
    }
    return choice, collected.done


class Collected(Said):
    """One answer put together, with all that belongs to it."""

    def __init__(self) -> None:
        super().__init__()
        self.logprobs: list[dict[str, Any]] = []
        self.done: Done | None = None

    def add(self, event: AnswerEvent) -> None:
        """The next one."""
        if isinstance(event, TokenText):
            self.logprobs.append(logprob_entry(event))
        elif isinstance(event, Done):
            self.done = event
        elif not isinstance(event, Began):
            super().add(event)

    @property
    def finish_reason(self) -> str:
        """ "tool_calls" when there are any and the answer was not cut."""
        assert self.done is not None
        return finish_reason(self.done, bool(self.calls))

    def message(self) -> dict[str, Any]:
        """As OpenAI has it, with the reasoning where vLLM and others put it."""
        message = super().message() | {"refusal": None}
        if self.calls and not self.text:
            message["content"] = None
        return message


async def _stream(service: Service, ask: Ask) -> Events:
    choices = [StreamedChoice(i, ask) for i in range(ask.request.n)]
    done: list[Done] = []
    answers = merged([ask.answer(service, choice.index) for choice in choices])
    try:
        waiting = len(choices)
        async for index, event in answers:
            if isinstance(event, Began):
                waiting -= 1
                for choice in choices if not waiting else ():  # only now is it certain that all can begin
                    yield _chunk(service, ask, [choice.first()])
            if isinstance(event, Done):
                done.append(event)
            for part in choices[index].parts(event):
                yield _chunk(service, ask, [part])
    finally:
        await answers.aclose()
    if ask.request.stream_options and ask.request.stream_options.include_usage:
        yield _chunk(service, ask, [], usage_of(done))
    yield b"data: [DONE]\n\n"


class StreamedChoice:
    """Turns the events of one answer into deltas."""

    def __init__(self, index: int, ask: Ask) -> None:
        self.index, self._calls = index, False
        self._logprobs: list[dict[str, Any]] | None = [] if ask.top_logprobs is not None else None

    def first(self) -> dict[str, Any]:
        """The role, which comes before anything else."""
        return self._part({"role": "assistant", "content": ""})

    def parts(self, event: AnswerEvent) -> list[dict[str, Any]]:
        """The parts of chunks for an event; log-probabilities go with the next text."""
        if isinstance(event, TokenText):
            assert self._logprobs is not None
            self._logprobs.append(logprob_entry(event))
        elif isinstance(event, TextDelta):
            return [self._part({"content": event.text})]
        elif isinstance(event, ReasoningDelta):
            return [self._part({"reasoning_content": event.text})]
        elif isinstance(event, ToolCallStart):
            self._calls = True
            return [self._part({"tool_calls": [{"index": event.index, **tool_call(event)}]})]
        elif isinstance(event, ToolCallArguments):
            arguments = {"arguments": event.json_delta}
            return [self._part({"tool_calls": [{"index": event.index, "function": arguments}]})]
        elif isinstance(event, Done):
            return [self._part({}, finish_reason(event, self._calls))]
        return []

    def _part(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        entries, logprobs = self._logprobs, None
        if entries and "role" not in delta:
            logprobs, self._logprobs = {"content": entries, "refusal": None}, []
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _chunk(
    service: Service, ask: Ask, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None
) -> bytes:
    chunk: dict[str, Any] = {
        "id": ask.id,
        "object": "chat.completion.chunk",
        "created": ask.created,
        "model": service.name,
        "choices": choices,
    }
    if ask.request.stream_options and ask.request.stream_options.include_usage:
        chunk["usage"] = usage
    return data(chunk)


def finish_reason(done: Done, calls: bool) -> str:
    """OpenAI's words for how an answer ended."""
    if done.reason == "stop":
        return "tool_calls" if calls else "stop"
    return done.reason


def logprob_entry(token: TokenText) -> dict[str, Any]:
    """One entry of logprobs.content."""
    entry = _token_entry(token.text, token.logprob)
    return entry | {"top_logprobs": [_token_entry(text, logprob) for _, text, logprob in token.top]}


def _token_entry(text: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(text)}


def usage_of(done: list[Done]) -> dict[str, Any]:
    """Tokens of a request; a prompt counts once, however many answers it has."""
    prompt = done[0].prompt_tokens
    completion = sum(one.completion_tokens for one in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": done[0].cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(one.reasoning_tokens for one in done)},
    }


def _error_event(error: FlashmoeError) -> bytes:
    return data(openai_error(500, " ".join(str(error).split())))
