"""Continuous batching: answers join and leave between steps, and share every read of an expert.

The idea is iteration-level scheduling (Yu et al., Orca, OSDI 2022) with prompts in pieces beside running answers
(Agrawal et al., arXiv 2308.16369).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field

from flashmoe.engine.engine import Engine
from flashmoe.engine.jobs import Deliver, Finished, Generation, SchedulerStats, Token
from flashmoe.engine.places import Places
from flashmoe.engine.prefix_cache import PrefixCache
from flashmoe.engine.sampler import Sampler, top_logprobs
from flashmoe.errors import BusyError, FlashmoeError, PromptError, ReadError
from flashmoe.models.decoder import SequenceState
from flashmoe.nn.weights import F32

# A step that carries a prompt's piece beside running answers should not keep these waiting for longer.
_STEP_SECONDS = 0.5
_SMALLEST_PIECE = 16
# While nobody waits, conversations are prepared for their next turn in pieces of so many tokens: long enough to use
# each expert that is read for several of them, and a request that comes meanwhile waits for one piece only.
_QUIET_PIECE = 256


@dataclass(eq=False)
class Job:
    """An answer on its way.  Only the scheduler touches it, apart from cancel()."""

    generation: Generation
    deliver: Deliver
    sampler: Sampler
    limit: int
    ids: list[int]  # all tokens so far, prompt and answer
    done: int = 0  # of them, in the state
    cached: int = 0
    produced: int = 0
    state: SequenceState | None = None
    alone: bool = False  # after a failed step: to find out whose reads fail
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """The answer is not wanted any more.  Thread-safe; its last event is Finished("cancelled")."""
        self.cancelled.set()

    @property
    def left(self) -> int:
        """Tokens that the state does not have yet."""
        return len(self.ids) - self.done


class Scheduler:
    """Runs many answers on one engine.

    submit(), Job.cancel(), stats() and close() are thread-safe; run() (or step()) belongs to one thread, on which
    events are delivered too.  An answer's tokens do not depend on its neighbours.
    """

    def __init__(
        self, engine: Engine, *, prefix_cache: PrefixCache | None = None, most_waiting: int = 64
    ) -> None:
        self._engine, self._prefixes, self._most_waiting = engine, prefix_cache, most_waiting
        self._places = Places(engine.states, prefix_cache)
        self._expected: deque[list[int]] = deque(maxlen=2 * len(engine.states))
        self._running: list[Job] = []
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._accepting, self._closed = True, False
        self._piece = 4 * _SMALLEST_PIECE
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = self._steps = 0
        self._step_seconds = 0.0
        self._finished: dict[str, int] = {}

    def submit(self, generation: Generation, deliver: Deliver) -> Job:
        """Queue an answer; `deliver` hears its tokens and then one Finished, on the scheduler's thread.

        Raises PromptError for a prompt that cannot be processed, BusyError when too many wait already.
        """
        prompt, context = generation.prompt, self._engine.plan.context
        self._engine.check(prompt)
        if len(prompt) >= context:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens and the context holds {context}: "
                "shorten it or raise --context"
            )
        room = context - len(prompt)
        most = generation.params.max_tokens
        limit = room if most is None else min(most, room)
        job = Job(generation, deliver, Sampler(generation.params, prompt), limit, list(prompt))
        with self._changed:
            if not self._accepting:
                raise BusyError("the server is shutting down: try another one")
            if len(self._waiting) >= self._most_waiting:
                raise BusyError(f"{len(self._waiting)} requests wait already: try again later")
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def expect(self, ids: list[int]) -> None:
        """Have the prefix cache know these tokens, which a later prompt will probably begin with.

        Thread-safe.  Done while there is nothing else to do; of too many, those asked for first are left out.
        """
        if self._prefixes is None or len(ids) >= self._engine.plan.context:
            return
        self._engine.check(ids)
        with self._changed:
            self._expected.append(ids)
            self._changed.notify_all()

    def stats(self) -> SchedulerStats:
        """Counters so far."""
        with self._changed:
            return SchedulerStats(
                len(self._running),
                len(self._waiting),
                self._prompt_tokens,
                self._cached_tokens,
                self._completion_tokens,
                dict(self._finished),
                self._steps,
                self._step_seconds,
                len(self._expected),
            )

    def run(self) -> None:
        """Work until close(); call it on a thread of its own."""
        while True:
            with self._changed:
                while not (self._closed or self._running or self._waiting or self._expected):
                    self._changed.wait()
                if self._closed:
                    break
            self.step()
        for job in [*self._running, *self._waiting]:
            self._end(job, "cancelled")

    def drain(self, timeout: float) -> bool:
        """Accept nothing more and wait until all answers are finished; False when that took longer than `timeout` s."""
        deadline = time.monotonic() + timeout
        self.refuse()
        with self._changed:
            while self._running or self._waiting:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    return False
        return True

    def refuse(self) -> None:
        """Accept nothing more.  May be called by a signal handler."""
        self._accepting = False

    @property
    def accepting(self) -> bool:
        """False when the end has begun."""
        return self._accepting

    def close(self) -> None:
        """End run() after the current step; answers that are not finished are cancelled."""
        with self._changed:
            self._accepting, self._closed = False, True
            self._changed.notify_all()

    def step(self) -> None:
        """One pass over the weights for everybody, if there is anybody."""
        for job in [*self._running, *self._waiting]:
            if job.cancelled.is_set():
                self._end(job, "cancelled")
        self._admit()
        batch = self._choose()
        if not batch:
            self._prepare()
            return
        wanted = [i for i, (job, count) in enumerate(batch) if job.left == count]
        began = time.perf_counter()
        try:
            logits = self._engine.step(
                [(_state(job), job.ids[job.done : job.done + count]) for job, count in batch], wanted
            )
        except ReadError as error:
            self._recover([job for job, _ in batch], error)
            return
        self._adapt(batch, time.perf_counter() - began)
        for job, count in batch:
            job.done += count
            self._snapshot(job)
        for row, i in zip(logits, wanted, strict=True):
            self._advance(batch[i][0], row)

    def _admit(self) -> None:
        with self._changed:
            while self._waiting and self._places:
                job = self._waiting.popleft()
                # Begins where the longest known prefix ends; the prompt's last token is always processed.
                job.state, job.done = self._places.take(job.ids[:-1])
                job.cached = job.done
                self._running.append(job)
                self._prompt_tokens += len(job.ids)
                self._cached_tokens += job.cached

    def _prepare(self) -> None:
        """A piece of what is expected; nobody runs or waits, so every place is free."""
        if self._prefixes is None or not self._expected:
            return
        ids = self._expected[0]
        state, done = self._places.take(ids)
        until = min(len(ids), done + min(_QUIET_PIECE, self._engine.plan.prefill_chunk))
        try:
            if until > done:
                self._engine.step([(state, ids[done:until])], [])
        except ReadError:  # who needs that expert is told when asking
            self._places.give(state, [])
            until = len(ids)
        else:
            self._places.give(state, ids[:until])
            if until == len(ids):
                self._prefixes.store(ids, state)
        with self._changed:
            if until == len(ids) and self._expected and self._expected[0] is ids:
                self._expected.popleft()

    def _choose(self) -> list[tuple[Job, int]]:
        """Who takes part in the step, with how many tokens: every running answer, then pieces of prompts."""
        suspect = [job for job in self._running if job.alone]
        jobs = suspect[:1] or self._running
        most = self._engine.plan.prefill_chunk
        decoding = [(job, 1) for job in jobs if job.left == 1]
        room = most - len(decoding)
        if decoding:
            room = min(room, self._piece)
        batch = decoding
        for job in jobs:
            if job.left > 1 and room > 0:
                count = min(job.left, room, _next_snapshot(job) - job.done)
                batch.append((job, count))
                room -= count
        return batch

    def _adapt(self, batch: list[tuple[Job, int]], seconds: float) -> None:
        """Pieces of prompts shrink when steps that running answers wait for take long, and grow when they do not."""
        self._steps += 1
        self._step_seconds += seconds
        pieces = sum(count for job, count in batch if job.left > 1)
        if not pieces or pieces == sum(count for _, count in batch):
            return
        if seconds > _STEP_SECONDS:
            self._piece = max(_SMALLEST_PIECE, self._piece // 2)
        elif seconds < _STEP_SECONDS / 2 and pieces >= self._piece:
            self._piece = min(self._engine.plan.prefill_chunk, 2 * self._piece)

    def _snapshot(self, job: Job) -> None:
        if self._prefixes is not None and job.done in job.generation.snapshot_at:
            self._prefixes.store(job.ids[: job.done], _state(job))

    def _advance(self, job: Job, logits: F32) -> None:
        """Choose the answer's next token and tell it, or end the answer."""
        generation = job.generation
        constraint = generation.constraint
        job.alone = False
        try:
            token = job.sampler.sample(logits, None if constraint is None else constraint.mask())
            if token in generation.stop_ids or token in generation.params.stop_token_ids:
                self._end(job, "stop")
                return
            if constraint is not None:
                constraint.accept(token)
        except FlashmoeError as error:  # this answer's alone
            self._end(job, "error", error)
            return
        except RuntimeError as error:  # the sampler: no token is left, or the logits are no numbers
            self._end(job, "error", PromptError(str(error)))
            return
        job.ids.append(token)
        job.produced += 1
        self._completion_tokens += 1
        job.deliver(_event(token, logits, generation.top_logprobs))
        if constraint is not None and constraint.is_done:
            self._end(job, "stop")
        elif job.produced >= job.limit:
            self._end(job, "length")

    def _recover(self, jobs: list[Job], error: ReadError) -> None:
        """A read failed, and all states of the step are half advanced.  Begin again, one by one.

        Whoever fails alone needs what cannot be read, and ends; the others compute the same bits once more.
        """
        if len(jobs) == 1:
            jobs[0].done = 0  # what the state holds is of no use
            self._end(jobs[0], "error", error)
            return
        for job in jobs:
            _state(job).clear()
            job.done, job.alone = 0, True

    def _end(self, job: Job, reason: str, error: FlashmoeError | None = None) -> None:
        event = Finished(reason, error, len(job.generation.prompt), job.cached, job.produced)
        with self._changed:
            if job.state is not None:
                self._places.give(job.state, job.ids[: job.done])
                job.state = None
            (self._running if job in self._running else self._waiting).remove(job)
            self._finished[reason] = self._finished.get(reason, 0) + 1
            self._changed.notify_all()
        job.deliver(event)


def _state(job: Job) -> SequenceState:
    assert job.state is not None, "a waiting answer has no state"
    return job.state


def _next_snapshot(job: Job) -> int:
    """The next position at which the step must end."""
    return min((at for at in job.generation.snapshot_at if at > job.done), default=len(job.ids))


def _event(token: int, logits: F32, count: int | None) -> Token:
    if count is None:
        return Token(token)
    top, log_sum = top_logprobs(logits, count)
    return Token(token, float(logits[token]) - log_sum, top)
