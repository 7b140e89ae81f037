"""POST /v1/completions: texts continued as they are."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from flashmoe.chat.dialects import TextDelta
from flashmoe.chat.prompts import Prompt
from flashmoe.engine.params import SamplingParams
from flashmoe.errors import FlashmoeError, RequestError
from flashmoe.server.openai_types import CompletionRequest
from flashmoe.server.problems import openai_error
from flashmoe.server.service import AnswerEvent, Began, Done, Service, TokenText, with_seed
from flashmoe.server.streaming import KEEP_ALIVE, Events, data, event_stream, merged, unless_left

router = APIRouter()

_MOST_PROMPTS = 64
_DEFAULT_TOKENS = 16  # as OpenAI has it


@dataclass(frozen=True)
class Ask:
    """A request made ready; every prompt has n answers, numbered through."""

    request: CompletionRequest
    prompts: list[Prompt]
    params: SamplingParams
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def count(self) -> int:
        """Answers in all."""
        return len(self.prompts) * self.request.n

    def answer(self, service: Service, index: int) -> AsyncGenerator[AnswerEvent, None]:
        """The index-th of all answers."""
        which, offset = divmod(index, self.request.n)
        return service.answer(
            self.prompts[which], with_seed(self.params, offset), None, self.request.logprobs
        )

    def frame(self, service: Service, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What whole answers and chunks have in common."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": service.name,
            "choices": choices,
        }


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continuations of one or several texts, whole or as a stream."""
    service: Service = request.app.state.service
    for name in ("echo", "suffix"):
        if getattr(body, name):
            raise RequestError(f"{name} is not supported: leave it out", name)
    prompts = [await _prompt(service, one) for one in _prompts(body.prompt)]
    ask = Ask(body, prompts, body.params(service.llm, body.max_tokens or _DEFAULT_TOKENS))
    if body.stream:
        return await event_stream(_stream(service, ask), _error_event)
    return JSONResponse(await unless_left(request, _whole(service, ask)))


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    single = isinstance(given, str) or (given and isinstance(given[0], int))
    prompts: list[Any] = [given] if single else list(given)
    if not 0 < len(prompts) <= _MOST_PROMPTS:
        raise RequestError(f"prompt must be 1 to {_MOST_PROMPTS} texts, got {len(prompts)}", "prompt")
    return prompts


async def _prompt(service: Service, given: str | list[int]) -> Prompt:
    return await service.text_prompt(given) if isinstance(given, str) else Prompt(given, parse=False)


async def _whole(service: Service, ask: Ask) -> dict[str, Any]:
    results = await asyncio.gather(*(_choice(service, ask, i) for i in range(ask.count)))
    return ask.frame(service, [choice for choice, _ in results]) | {
        "usage": _usage(ask, [done for _, done in results])
    }


async def _choice(service: Service, ask: Ask, index: int) -> tuple[dict[str, Any], Done]:
    text, tokens, ending = "", [], None
    async for event in ask.answer(service, index):
        if isinstance(event, TextDelta):
            text += event.text
        elif isinstance(event, TokenText):
            tokens.append(event)
        elif isinstance(event, Done):
            ending = event
    assert ending is not None
    return _part(ask, index, text, tokens, ending.reason), ending


async def _stream(service: Service, ask: Ask) -> Events:
    done: list[Done] = []
    waiting = ask.count
    tokens: list[list[TokenText]] = [[] for _ in range(ask.count)]
    answers = merged([ask.answer(service, i) for i in range(ask.count)])
    try:
        async for index, event in answers:
            if isinstance(event, Began):
                waiting -= 1
                if not waiting:  # all can begin: tell the client that it is served
                    yield KEEP_ALIVE
            elif isinstance(event, TokenText):
                tokens[index].append(event)
            elif isinstance(event, TextDelta):
                yield data(ask.frame(service, [_part(ask, index, event.text, tokens[index], None)]))
                tokens[index] = []
            elif isinstance(event, Done):
                done.append(event)
                yield data(ask.frame(service, [_part(ask, index, "", tokens[index], event.reason)]))
    finally:
        await answers.aclose()
    if ask.request.stream_options and ask.request.stream_options.include_usage:
        yield data(ask.frame(service, []) | {"usage": _usage(ask, done)})
    yield b"data: [DONE]\n\n"


def _part(ask: Ask, index: int, text: str, tokens: list[TokenText], reason: str | None) -> dict[str, Any]:
    logprobs = None
    if ask.request.logprobs is not None:
        logprobs = {
            "tokens": [_text(token.text) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{_text(t): logprob for _, t, logprob in token.top} for token in tokens],
            "text_offset": [],
        }
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _usage(ask: Ask, done: list[Done]) -> dict[str, Any]:
    prompt = sum(len(one.ids) for one in ask.prompts)
    completion = sum(one.completion_tokens for one in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in done[:: ask.request.n])},
    }


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")


def _error_event(error: FlashmoeError) -> bytes:
    return data(openai_error(500, " ".join(str(error).split())))
