"""One model and its scheduler, as the APIs see them: conversations in, events out."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flashmoe.chat.answer_text import AnswerText
from flashmoe.chat.continuation import Conversation, Said, next_prefix
from flashmoe.chat.dialects import Event
from flashmoe.chat.llm import LLM
from flashmoe.chat.messages import Message
from flashmoe.chat.prompts import Prompt, Prompts
from flashmoe.chat.structured import StructuredOutput
from flashmoe.engine.jobs import Finished, Generation, Token
from flashmoe.engine.params import SamplingParams
from flashmoe.engine.scheduler import Job, Scheduler
from flashmoe.errors import BusyError, PromptError


@dataclass(frozen=True)
class TokenText:
    """The log-probability of one token, with its text as bytes; top: the most likely ones likewise."""

    token_id: int
    text: bytes
    logprob: float
    top: list[tuple[int, bytes, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Began:
    """The first event: the request has been accepted, though it may have to wait, and its prompt be long."""


@dataclass(frozen=True)
class Done:
    """The answer's end: "stop" or "length"; what stopped it, and counts of tokens.

    reasoning_tokens: those of the completion that were reasoning, its end marker with them.
    """

    reason: str
    stop_text: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0


AnswerEvent = Began | Event | TokenText | Done


class Service:
    """Thread-safe for the event loop: generation runs on a thread of its own."""

    def __init__(self, llm: LLM, scheduler: Scheduler, name: str) -> None:
        self.llm, self.scheduler, self.name = llm, scheduler, name
        self.prompts = Prompts(llm)
        self._thread = threading.Thread(target=scheduler.run, name="inference", daemon=True)
        # Two at a time: rendering and tokenizing are quick, and a schema's compilation must not take all cores.
        self._preparing = asyncio.Semaphore(2)
        self._expecting: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to generate."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False when the inference thread has died: nothing will be answered any more."""
        return self._thread.is_alive()

    def stop(self, timeout: float) -> bool:
        """Let running answers finish for at most `timeout` s, then cancel them; False when some were."""
        finished = self.scheduler.drain(timeout) if self.alive else True
        self.scheduler.close()
        if self.alive:
            self._thread.join()
        return finished

    async def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Render and encode a conversation.  Raises PromptError or BundleError."""
        async with self._preparing:
            return await asyncio.to_thread(self.prompts.render, messages, tools, dict(variables or {}))

    async def text_prompt(self, text: str) -> Prompt:
        """A text to be continued as it is.  Raises PromptError."""
        async with self._preparing:
            ids = await asyncio.to_thread(self.llm.tokenizer.encode, text)
        return Prompt(ids, parse=False)

    async def answer(
        self,
        prompt: Prompt,
        params: SamplingParams,
        structured: StructuredOutput | None = None,
        top_logprobs: int | None = None,
    ) -> AsyncGenerator[AnswerEvent, None]:
        """The answer as it comes; closing the iterator cancels it.

        Raises PromptError, StructureError or BusyError before the first event; ReadError, StructureError, and
        BusyError when the server ends, later.
        """
        if top_logprobs is not None:
            await asyncio.to_thread(lambda: self._token_bytes)  # 0.5 s for a large vocabulary, once
        constraint = None
        if structured is not None:
            structured = prompt.after_reasoning(structured)
            async with self._preparing:
                constraint = await asyncio.to_thread(self.llm.constraint, structured, params)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Token | Finished]()

        def deliver(event: Token | Finished) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        stops = frozenset(self.llm.tokenizer.stop_ids)
        generation = Generation(prompt.ids, params, stops, constraint, top_logprobs, prompt.snapshot_at)
        job = self.scheduler.submit(generation, deliver)
        try:
            yield Began()
            async for event in self._follow(prompt, params, events, job):
                yield event
        finally:
            job.cancel()

    async def _follow(
        self, prompt: Prompt, params: SamplingParams, events: asyncio.Queue[Token | Finished], job: Job
    ) -> AsyncGenerator[AnswerEvent, None]:
        """The events of a job until its end."""
        decoder, parser = self.llm.tokenizer.decoder(not prompt.parse), self.prompts.parser(prompt)
        text = AnswerText(decoder, params.stop, parser, prompt.reasoning_open)
        while True:
            event = await events.get()
            if isinstance(event, Finished):
                break
            if text.stop_found():
                continue  # tokens that were on their way when the stop string was found
            if event.logprob is not None:
                yield self._token_text(event)
            for piece in text.push(event.id):
                yield piece
            if text.stop_found():
                job.cancel()
        if event.error is not None:
            raise event.error
        if event.reason == "cancelled" and text.stopped is None:  # not by us: by the scheduler's end
            raise BusyError("the server is shutting down, and the answer is not finished: try another one")
        for piece in text.finish():
            yield piece
        self._look_ahead(prompt.conversation, text.said)
        reason = event.reason if text.stopped is None else "stop"
        counts = event.prompt_tokens, event.cached_tokens, event.completion_tokens
        yield Done(reason, text.stopped, *counts, text.reasoning_tokens)

    def _look_ahead(self, conversation: Conversation | None, said: Said) -> None:
        """Have a conversation ready for its next turn, later."""
        if conversation is not None:
            task = asyncio.create_task(self._expect(conversation, said))
            self._expecting.add(task)  # the loop itself does not keep it
            task.add_done_callback(self._expecting.discard)

    async def _expect(self, conversation: Conversation, said: Said) -> None:
        async with self._preparing:
            with suppress(PromptError):  # the template would refuse the next turn
                ids = await asyncio.to_thread(next_prefix, self.llm, conversation, said)
                self.scheduler.expect(ids)

    def _token_text(self, token: Token) -> TokenText:
        spelling = self._token_bytes
        top = [(token_id, spelling[token_id], logprob) for token_id, logprob in token.top]
        assert token.logprob is not None
        return TokenText(token.id, spelling[token.id], token.logprob, top)

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        return self.llm.tokenizer.token_bytes(int(self.llm.bundle.text_config["vocab_size"]))


def with_seed(params: SamplingParams, offset: int) -> SamplingParams:
    """The parameters of the offset-th of several answers: another seed if one is given."""
    if params.seed is None or offset == 0:
        return params
    return dataclasses.replace(params, seed=(params.seed + offset) % (1 << 64))
