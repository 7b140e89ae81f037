"""Answers that share steps: the same tokens as alone, in any company, also when reads fail and clients leave."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.jobs import Finished, Generation, Token
from flashmoe.engine.params import SamplingParams
from flashmoe.engine.prefix_cache import PrefixCache
from flashmoe.engine.scheduler import Job, Scheduler
from flashmoe.errors import BusyError, PromptError, ReadError

PROMPTS = [[5, 17, 300, 41, 9], [7], list(range(100, 190)), [900, 5, 5, 5], list(range(40, 75))]


class Answer:
    """Collects the events of one answer."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.tokens: list[Token] = []
        self.end: Finished | None = None

    def __call__(self, event: Token | Finished) -> None:
        assert self.end is None, "nothing comes after the end"
        if isinstance(event, Finished):
            self.end = event
        else:
            self.tokens.append(event)
            self.ids.append(event.id)


@pytest.fixture(scope="module")
def engine(demo_bundle: Path) -> Iterator[Engine]:
    options = EngineOptions(2 << 30, context=256, sequences=3, expert_slots=80, prefill_chunk=64)
    with Engine.open(demo_bundle, options) as engine:
        yield engine


def params(i: int, **given: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0 if i % 2 else 0.9, seed=i, **{"max_tokens": 6 + 3 * i} | given)


@pytest.fixture(scope="module")
def expected(engine: Engine) -> list[list[int]]:
    return [list(engine.generate_ids(prompt, params(i), set())) for i, prompt in enumerate(PROMPTS)]


def finish(scheduler: Scheduler, answers: list[Answer], most: int = 500) -> None:
    for _ in range(most):
        if all(answer.end is not None for answer in answers):
            return
        scheduler.step()
    raise AssertionError("the answers never ended")


def submit(scheduler: Scheduler, i: int, **given: Any) -> tuple[Answer, Job]:
    answer = Answer()
    return answer, scheduler.submit(Generation(PROMPTS[i], params(i), **given), answer)


def test_company_changes_no_token(engine: Engine, expected: list[list[int]]) -> None:
    scheduler = Scheduler(engine)
    answers = [submit(scheduler, i)[0] for i in (2, 0, 4)]
    for _ in range(3):
        scheduler.step()
    answers += [submit(scheduler, i)[0] for i in (3, 1)]  # they wait for a free sequence
    assert scheduler.stats().waiting == 2
    finish(scheduler, answers)
    assert [answer.ids for answer in answers] == [expected[i] for i in (2, 0, 4, 3, 1)]
    assert {answer.end.reason for answer in answers if answer.end} == {"length"}
    stats = scheduler.stats()
    assert (stats.running, stats.waiting, stats.finished) == (0, 0, {"length": 5})
    assert stats.completion_tokens == sum(map(len, expected))


def test_running_answers_go_on_beside_a_prompt(engine: Engine, expected: list[list[int]]) -> None:
    scheduler = Scheduler(engine)
    first, _ = submit(scheduler, 4)
    scheduler.step()
    second, _ = submit(scheduler, 2)
    scheduler._piece = 16
    before = len(first.ids)
    steps = 0
    while not second.ids:
        scheduler.step()
        steps += 1
    assert len(first.ids) - before == steps >= 3  # 16, 32, 42 tokens of the prompt at best
    finish(scheduler, [first, second])
    assert (first.ids, second.ids) == (expected[4], expected[2])


def test_a_cancelled_answer_frees_its_place(engine: Engine, expected: list[list[int]]) -> None:
    scheduler = Scheduler(engine)
    pairs = [submit(scheduler, i) for i in (2, 4, 0, 3)]
    scheduler.step()
    pairs[0][1].cancel()
    finish(scheduler, [answer for answer, _ in pairs])
    ends = [answer.end.reason for answer, _ in pairs if answer.end]
    assert ends == ["cancelled", "length", "length", "length"]
    assert pairs[3][0].ids == expected[3]
    waiting = [submit(scheduler, i) for i in (2, 4, 0, 3)]
    waiting[3][1].cancel()  # before it has begun
    finish(scheduler, [answer for answer, _ in waiting])
    assert waiting[3][0].end is not None
    assert (waiting[3][0].end.reason, waiting[3][0].ids) == ("cancelled", [])


def test_log_probabilities_and_stop_tokens(engine: Engine, expected: list[list[int]]) -> None:
    scheduler = Scheduler(engine)
    answer, _ = submit(scheduler, 3, top_logprobs=4, stop_ids=frozenset([expected[3][4]]))
    finish(scheduler, [answer])
    cut = expected[3].index(expected[3][4])
    assert answer.ids == expected[3][:cut]
    assert answer.end == Finished("stop", None, 4, 0, cut)
    engine.start()
    logits = engine.feed(PROMPTS[3], "last")[0].astype(np.float64)
    exact = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    first = answer.tokens[0]
    assert first.logprob == pytest.approx(exact[first.id], abs=1e-4)
    assert [token for token, _ in first.top] == np.argsort(-exact, kind="stable")[:4].tolist()
    assert [value for _, value in first.top] == pytest.approx(sorted(exact)[:-5:-1], abs=1e-4)


def test_a_failed_read_ends_only_the_answer_that_needs_it(
    engine: Engine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(engine)
    pairs = [submit(scheduler, i) for i in (2, 4, 0)]
    for _ in range(4):
        scheduler.step()
    doomed, step = pairs[1][1], engine.step

    def failing(parts: Any, wanted: Any) -> Any:
        if any(state is doomed.state for state, _ in parts):
            for state, _ in parts:  # as a read leaves them that fails in the middle of a step
                state.layers[0].conv.fill(np.nan)
            raise ReadError(f"layer 3, expert 1: cannot read: {errno.errorcode[errno.EIO]}")
        return step(parts, wanted)

    monkeypatch.setattr(engine, "step", failing)
    finish(scheduler, [answer for answer, _ in pairs])
    assert pairs[1][0].end is not None
    assert pairs[1][0].end.reason == "error"
    assert "layer 3, expert 1" in str(pairs[1][0].end.error)
    assert (pairs[0][0].ids, pairs[2][0].ids) == (expected[2], expected[0])
    monkeypatch.setattr(engine, "step", step)
    answer, _ = submit(scheduler, 4)
    finish(scheduler, [answer])
    assert answer.ids == expected[4]


class OnlyEven:
    """A constraint: even tokens, and the end after five of them."""

    def __init__(self, vocab: int) -> None:
        self.words = np.full(-(-vocab // 32), 0x55555555, np.uint32)
        self.accepted: list[int] = []

    def mask(self) -> Any:
        return self.words

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)

    @property
    def is_done(self) -> bool:
        return len(self.accepted) == 5


def test_a_constraint_rules_its_answer_only(engine: Engine, expected: list[list[int]]) -> None:
    scheduler = Scheduler(engine)
    constraint = OnlyEven(engine.bundle.text_config["vocab_size"])
    bound, _ = submit(scheduler, 2, constraint=constraint)
    free, _ = submit(scheduler, 4)
    finish(scheduler, [bound, free])
    assert bound.ids == constraint.accepted
    assert len(bound.ids) == 5
    assert all(token % 2 == 0 for token in bound.ids)
    assert bound.end is not None
    assert bound.end.reason == "stop"
    assert free.ids == expected[4]


def test_a_known_prefix_is_not_processed_again(engine: Engine, expected: list[list[int]]) -> None:
    scheduler = Scheduler(engine, prefix_cache=PrefixCache(64 << 20, "demo"))
    prompt = PROMPTS[2]
    first = Answer()
    scheduler.submit(Generation(prompt, params(2), snapshot_at=(33, 80)), first)
    finish(scheduler, [first])
    assert first.ids == expected[2]
    longer = [*prompt[:80], 3, 4, 5]
    alone = list(engine.generate_ids(longer, params(1), set()))
    again, same = Answer(), Answer()
    scheduler.submit(Generation(longer, params(1)), again)
    scheduler.submit(Generation([*prompt[:33], 1], params(0)), same)
    finish(scheduler, [again, same])
    assert again.ids == alone
    assert again.end is not None
    assert same.end is not None
    assert (again.end.cached_tokens, same.end.cached_tokens) == (80, 33)
    assert scheduler.stats().cached_tokens == 113
    assert same.ids == list(engine.generate_ids([*prompt[:33], 1], params(0), set()))


def test_what_cannot_be_queued(engine: Engine) -> None:
    scheduler = Scheduler(engine, most_waiting=2)
    with pytest.raises(PromptError, match="no tokens"):
        scheduler.submit(Generation([], params(0)), Answer())
    with pytest.raises(PromptError, match="shorten it"):
        scheduler.submit(Generation([1] * 256, params(0)), Answer())
    with pytest.raises(PromptError, match="outside the vocabulary"):
        scheduler.submit(Generation([1 << 30], params(0)), Answer())
    for _ in range(2):
        submit(scheduler, 0)
    with pytest.raises(BusyError, match="2 requests wait already"):
        submit(scheduler, 0)


def test_draining_and_closing(engine: Engine, expected: list[list[int]]) -> None:
    import threading

    scheduler = Scheduler(engine)
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    answers = [submit(scheduler, i)[0] for i in (0, 3, 4, 1)]
    assert scheduler.drain(60)
    assert [answer.ids for answer in answers] == [expected[i] for i in (0, 3, 4, 1)]
    with pytest.raises(BusyError, match="shutting down"):
        submit(scheduler, 0)
    scheduler.close()
    thread.join(10)
    assert not thread.is_alive()


def test_closing_cancels_the_rest(engine: Engine) -> None:
    import threading

    scheduler = Scheduler(engine)
    answers = [submit(scheduler, i)[0] for i in range(5)]
    scheduler.step()
    scheduler.close()
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    thread.join(10)
    assert not scheduler.drain(0) or all(answer.end is not None for answer in answers)
    assert {answer.end.reason for answer in answers if answer.end} <= {"cancelled", "length"}


def test_what_is_expected_is_prepared_while_nobody_waits(engine: Engine) -> None:
    prefixes = PrefixCache(64 << 20, "demo")
    scheduler = Scheduler(engine, prefix_cache=prefixes)
    ids = PROMPTS[2] + PROMPTS[4]
    running, _ = submit(scheduler, 0)
    scheduler.expect(ids)
    finish(scheduler, [running])
    assert scheduler.stats().expected == 1, "running answers come first"
    while scheduler.stats().expected:
        scheduler.step()
    alone = list(
        engine.generate_ids([*ids, 3], params(1), set())
    )  # in the first place, which forgets nothing by it
    answer = Answer()
    scheduler.submit(Generation([*ids, 3], params(1)), answer)
    finish(scheduler, [answer])
    assert answer.end is not None
    assert answer.end.cached_tokens == len(ids)
    assert answer.ids == alone
    assert prefixes.longest([*ids, 3]) == len(ids)


def test_an_expert_that_cannot_be_read_ends_the_preparing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(parts: Any, wanted: Any) -> Any:
        raise ReadError("layer 3, expert 1: cannot read")

    scheduler = Scheduler(engine, prefix_cache=PrefixCache(64 << 20, "demo"))
    scheduler.expect(PROMPTS[2])
    monkeypatch.setattr(engine, "step", failing)
    scheduler.step()
    assert scheduler.stats().expected == 0
    assert len(scheduler._places) == 3
