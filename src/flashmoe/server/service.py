"""One model and its scheduler, as the APIs see them: conversations in, events out."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flashmoe.chat.dialects import Event, PlainParser, ReasoningDelta, TextDelta, detect
from flashmoe.chat.dialects.base import Dialect, EventParser
from flashmoe.chat.llm import LLM
from flashmoe.chat.messages import Message
from flashmoe.chat.stopping import StopStrings
from flashmoe.chat.structured import StructuredOutput
from flashmoe.engine.jobs import Finished, Generation, Token
from flashmoe.engine.params import SamplingParams
from flashmoe.engine.scheduler import Job, Scheduler
from flashmoe.engine.tokenizer import TextDecoder
from flashmoe.errors import BusyError, FlashmoeError, PromptError
from flashmoe.server.continuation import Conversation, Said, next_prefix
from flashmoe.server.tool_choice import strict_tools

_RENDER_ARGUMENTS = {"self", "messages", "tools", "add_generation_prompt"}
_THINK_END = "</think>"


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to be processed.

    snapshot_at: see Generation.  tools: those that the answer may call.  reasoning_open: the answer begins inside the
    reasoning.  parse: split reasoning and tool calls out of the answer.  conversation: that it was rendered from.
    """

    ids: list[int]
    snapshot_at: tuple[int, ...] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    reasoning_open: bool = False
    parse: bool = True
    conversation: Conversation | None = None


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
        try:
            self._dialect: Dialect | None = detect(llm.chat_template.source)
        except FlashmoeError:  # without a template there are no conversations, but completions
            self._dialect = None
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
            return await asyncio.to_thread(self._render, messages, tools, dict(variables or {}))

    async def text_prompt(self, text: str) -> Prompt:
        """A text to be continued as it is.  Raises PromptError."""
        async with self._preparing:
            ids = await asyncio.to_thread(self.llm.tokenizer.encode, text)
        return Prompt(ids, parse=False)

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
        grammar, markers = None, self.llm.tokenizer.added_tokens
        if self._dialect is not None and prompt.tools:
            grammar = self._dialect.call_grammar(prompt.tools, parallel=parallel, token_ids=markers)
        if grammar is None:
            raise PromptError(
                "this model's chat template has no tool calls that could be forced: use tool_choice auto"
            )
        return StructuredOutput.lark(grammar if forced else _text_before(grammar, markers))

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
            if prompt.reasoning_open and structured.after is None:
                structured = structured.begin_after(_THINK_END)
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
        decoder, parser = self.llm.tokenizer.decoder(not prompt.parse), self._parser(prompt)
        text = _AnswerText(decoder, params.stop, parser, prompt.reasoning_open)
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

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: dict[str, Any],
    ) -> Prompt:
        for name in sorted(_RENDER_ARGUMENTS & variables.keys()):
            raise PromptError(f"the template's variable {name} cannot be set: the request has a field for it")
        template, tokenizer = self.llm.chat_template, self.llm.tokenizer
        text = template.render(messages, tools=tools, **variables)
        ids = tokenizer.encode(text, add_special_tokens=False)
        boundaries = set()
        for earlier in (messages, messages[:-1]):
            if earlier:
                boundaries.add(self._shared(ids, earlier, tools, variables))
        return Prompt(
            ids,
            tuple(sorted(at for at in boundaries if 0 < at < len(ids))),
            tools,
            self._dialect.opens_reasoning(text) if self._dialect else text.rstrip().endswith("<think>"),
            conversation=Conversation(messages, tools, variables),
        )

    def _shared(
        self,
        ids: list[int],
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: dict[str, Any],
    ) -> int:
        """How many tokens the prompt shares with the conversation up to these messages, so with what continues it."""
        try:
            text = self.llm.chat_template.render(
                messages, tools=tools, **variables | {"add_generation_prompt": False}
            )
        except PromptError:  # some templates refuse a conversation that does not end with the user
            return 0
        known = self.llm.tokenizer.encode(text, add_special_tokens=False)
        return next(
            (i for i, (a, b) in enumerate(zip(ids, known, strict=False)) if a != b), min(len(ids), len(known))
        )

    def _parser(self, prompt: Prompt) -> EventParser:
        if not prompt.parse:
            return _Verbatim()
        if self._dialect is None:
            return PlainParser(prompt.reasoning_open)
        return self._dialect.parser(prompt.tools, prompt.reasoning_open)

    def _token_text(self, token: Token) -> TokenText:
        spelling = self._token_bytes
        top = [(token_id, spelling[token_id], logprob) for token_id, logprob in token.top]
        assert token.logprob is not None
        return TokenText(token.id, spelling[token.id], token.logprob, top)

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        return self.llm.tokenizer.token_bytes(int(self.llm.bundle.text_config["vocab_size"]))


class _AnswerText:
    """Tokens to text, to what comes before a stop string, to the dialect's events."""

    def __init__(
        self, decoder: TextDecoder, stops: Sequence[str], parser: EventParser, reasoning: bool
    ) -> None:
        self._decoder, self._stops, self._parser = decoder, StopStrings(stops), parser
        self._reasoning, self.reasoning_tokens = reasoning, 0
        self.said = Said()

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.found

    def stop_found(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stopped is not None

    def push(self, token_id: int) -> list[Event]:
        text, _ = self._stops.push(self._decoder.push(token_id))
        events = self._parser.push(text) if text else []
        self.reasoning_tokens += self._reasoning  # the marker that ends it is a part of it
        if events:
            self._reasoning = isinstance(events[-1], ReasoningDelta)
        return self._heard(events)

    def finish(self) -> list[Event]:
        events = []
        if self.stopped is None:
            text, stopped = self._stops.push(self._decoder.flush())
            events = self._parser.push(text if stopped else text + self._stops.flush())
        return self._heard(events + self._parser.finish())

    def _heard(self, events: list[Event]) -> list[Event]:
        for event in events:
            self.said.add(event)
        return events


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


def with_seed(params: SamplingParams, offset: int) -> SamplingParams:
    """The parameters of the offset-th of several answers: another seed if one is given."""
    if params.seed is None or offset == 0:
        return params
    return dataclasses.replace(params, seed=(params.seed + offset) % (1 << 64))
