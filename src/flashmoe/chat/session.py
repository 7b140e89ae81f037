"""A model that answers one conversation in this process, whose sequence stays between the turns.

A scheduler with a single place works on a thread of its own.  While the user reads and types, it processes what the
next prompt will begin with (chat/continuation.py); a prompt then goes on from there instead of from its start.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flashmoe.chat.answer_text import AnswerText
from flashmoe.chat.continuation import next_prefix
from flashmoe.chat.dialects import Event
from flashmoe.chat.llm import LLM
from flashmoe.chat.messages import Message
from flashmoe.chat.prompts import Prompt, Prompts, Tools
from flashmoe.engine.jobs import Finished, Generation, Token
from flashmoe.engine.params import SamplingParams
from flashmoe.engine.prefix_cache import PrefixCache
from flashmoe.engine.scheduler import Job, Scheduler
from flashmoe.errors import PromptError
from flashmoe.store.stats import CacheStats

# How often a waiting reader is told of a prompt's progress, and how soon the end of the inference thread is noticed.
_TICK_SECONDS = 0.25
_MOST_WAITING = 4  # answers that were given up leave at the end of their step


@dataclass(frozen=True)
class Reading:
    """A prompt is being processed: of its `total` tokens, `done` are."""

    done: int
    total: int


@dataclass(frozen=True)
class AnswerEnd:
    """The answer's end: "stop" or "length", and what was measured.

    cached_tokens: of the prompt, those that were known already.  first_token_seconds: from the question on; None when
    no token came.  decode_seconds: for all tokens after the first.  hit_rate: of experts, None when none was needed.
    """

    reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token_seconds: float | None
    decode_seconds: float
    hit_rate: float | None
    bytes_read: int

    @property
    def decode_tok_s(self) -> float | None:
        """Tokens a second after the first one; None for less than two."""
        steps = self.completion_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else None


AnswerEvent = Reading | Event | AnswerEnd


class ChatSession:
    """Used by one thread; a context manager: close() ends its own one."""

    def __init__(self, llm: LLM, prefix_cache: PrefixCache) -> None:
        self.llm, self.prompts = llm, Prompts(llm)
        self._prefixes = prefix_cache
        self._scheduler = Scheduler(llm.engine, prefix_cache=prefix_cache, most_waiting=_MOST_WAITING)
        self._thread = threading.Thread(target=self._scheduler.run, name="inference", daemon=True)
        self._thread.start()

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the answer at work after its step, and finish writing the prefix cache."""
        self._scheduler.close()
        self._thread.join()
        self._prefixes.close()

    def answer(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        tools: Tools | None = None,
        variables: Mapping[str, Any] | None = None,
        forced: bool = False,
    ) -> Generator[AnswerEvent, None, None]:
        """The answer to a conversation as it comes, an AnswerEnd last; closing the iterator gives the answer up.

        variables: the chat template's own.  forced: the answer must call one of the tools.
        Raises BundleError, PromptError, StructureError or ReadError.
        """
        prompt = self.prompts.render(messages, tools, variables or {})
        form = self.prompts.tool_structure(prompt, None, forced)
        constraint = None if form is None else self.llm.constraint(prompt.after_reasoning(form), params)
        stops = frozenset(self.llm.tokenizer.stop_ids)
        generation = Generation(prompt.ids, params, stops, constraint, None, prompt.snapshot_at)
        events: queue.SimpleQueue[Token | Finished] = queue.SimpleQueue()
        clock = _Clock(self.llm.cache_stats())
        job = self._scheduler.submit(generation, events.put)
        try:
            yield from self._follow(prompt, params, job, events, clock)
        finally:
            job.cancel()

    def _follow(
        self,
        prompt: Prompt,
        params: SamplingParams,
        job: Job,
        events: queue.SimpleQueue[Token | Finished],
        clock: _Clock,
    ) -> Generator[AnswerEvent, None, None]:
        parser = self.prompts.parser(prompt)
        text = AnswerText(self.llm.tokenizer.decoder(False), params.stop, parser, prompt.reasoning_open)
        while True:
            event = self._next(events)
            if event is None:
                if clock.first is None:
                    yield Reading(job.done, len(prompt.ids))
                continue
            if isinstance(event, Finished):
                break
            clock.token()
            if not text.stop_found():
                yield from text.push(event.id)
                if text.stop_found():
                    job.cancel()
        if event.error is not None:
            raise event.error
        yield from text.finish()
        self._look_ahead(prompt, text)
        yield clock.end("stop" if text.stop_found() else event.reason, event, self.llm.cache_stats())

    def _next(self, events: queue.SimpleQueue[Token | Finished]) -> Token | Finished | None:
        with suppress(queue.Empty):
            return events.get(timeout=_TICK_SECONDS)
        if not self._thread.is_alive():
            raise RuntimeError("the inference thread has died")
        return None

    def _look_ahead(self, prompt: Prompt, text: AnswerText) -> None:
        """Have the conversation ready for its next turn, while the user thinks."""
        if prompt.conversation is not None:
            with suppress(PromptError):  # the template would refuse the next turn
                self._scheduler.expect(next_prefix(self.llm, prompt.conversation, text.said))


class _Clock:
    """Times and counters of one answer."""

    def __init__(self, before: CacheStats) -> None:
        self._before, self._asked = before, time.perf_counter()
        self.first: float | None = None
        self._last = 0.0

    def token(self) -> None:
        """A token has come."""
        self._last = time.perf_counter()
        self.first = self.first or self._last

    def end(self, reason: str, finished: Finished, now: CacheStats) -> AnswerEnd:
        """What was measured."""
        reads = now.since(self._before)
        return AnswerEnd(
            reason,
            finished.prompt_tokens,
            finished.cached_tokens,
            finished.completion_tokens,
            None if self.first is None else self.first - self._asked,
            0.0 if self.first is None else self._last - self.first,
            reads.total.hit_rate,
            reads.bytes_read,
        )
