"""What is asked of the scheduler, and what it tells in return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from flashmoe.engine.constraint import Constraint
from flashmoe.engine.params import SamplingParams
from flashmoe.errors import FlashmoeError


@dataclass(frozen=True)
class Generation:
    """One answer to be generated.

    stop_ids: tokens that end it and are not part of it.  constraint: which tokens may come; belongs to this answer.
    top_logprobs: None for no log-probabilities, else how many of the most likely tokens come with each one.
    snapshot_at: positions of the prompt (numbers of tokens) that later prompts will probably share; the prefix cache
    keeps the sequence as it is there.
    """

    prompt: list[int]
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    snapshot_at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Token:
    """The next token of an answer; logprob and top (ids with theirs) as Generation.top_logprobs asks.

    Log-probabilities are the model's own, before temperature and penalties.
    """

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Finished:
    """The last event.  reason: "stop", "length", "cancelled" or "error" (then `error` says what)."""

    reason: str
    error: FlashmoeError | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, taken from the prefix cache
    completion_tokens: int = 0


Deliver = Callable[[Token | Finished], None]


@dataclass(frozen=True)
class SchedulerStats:
    """Counters since the start, and how many answers are being generated or wait now.

    expected: prefixes that the prefix cache is still to learn (Scheduler.expect).
    """

    running: int
    waiting: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finished: dict[str, int]  # by reason
    steps: int
    step_seconds: float
    expected: int = 0
