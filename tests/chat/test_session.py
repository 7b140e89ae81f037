"""A session over the demo model: the same answers as LLM gives, and turns that go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashmoe.chat.continuation import Said
from flashmoe.chat.dialects import TextDelta, ToolCallEnd
from flashmoe.chat.llm import LLM
from flashmoe.chat.session import AnswerEnd, ChatSession, Reading
from flashmoe.engine.params import SamplingParams
from flashmoe.engine.prefix_cache import PrefixCache
from flashmoe.errors import PromptError, ReadError

ASK = [{"role": "user", "content": "Tell me a story about a mouse."}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["Oslo", "Rome"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def session(demo_bundle: Path) -> Iterator[ChatSession]:
    with (
        LLM(demo_bundle, memory="2GiB", context=2048, prefix_cache="32MiB") as llm,
        ChatSession(llm, PrefixCache(32 << 20, llm.engine.identity)) as opened,
    ):
        yield opened


def ask(session: ChatSession, messages: Any, **given: Any) -> tuple[str, AnswerEnd]:
    events = list(session.answer(messages, given.pop("params", GREEDY), **given))
    assert isinstance(events[-1], AnswerEnd)
    return "".join(event.text for event in events if isinstance(event, TextDelta)), events[-1]


def idle(session: ChatSession) -> None:
    for _ in range(500):
        stats = session._scheduler.stats()
        if stats.running == stats.waiting == stats.expected == 0:
            return
        time.sleep(0.02)
    raise AssertionError(f"still busy: {stats}")


def test_an_answer_is_the_models(session: ChatSession, demo_llm: LLM) -> None:
    text, end = ask(session, ASK)
    assert text == demo_llm.chat(ASK, GREEDY).text
    assert (end.reason, end.completion_tokens) == ("length", 24)
    assert end.first_token_seconds is not None
    assert end.decode_tok_s is not None


@pytest.mark.parametrize("thinking", [False, True])
def test_a_second_turn_processes_what_is_new_only(session: ChatSession, thinking: bool) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "mice and cats " * 60 + str(thinking)}]
    variables = {"enable_thinking": thinking}
    said = Said()
    for event in session.answer(messages, GREEDY, None, variables):
        if not isinstance(event, AnswerEnd | Reading):
            said.add(event)
    idle(session)
    messages += [said.message(), {"role": "user", "content": "More"}]
    text, end = ask(session, messages, variables=variables)
    assert end.prompt_tokens > 150
    assert end.prompt_tokens - end.cached_tokens < 16
    fresh = session.llm.chat_ids(messages, **variables)
    assert len(fresh) == end.prompt_tokens
    assert text or thinking


def test_giving_up_frees_the_model_at_once(session: ChatSession, demo_llm: LLM) -> None:
    events = session.answer(ASK, SamplingParams(temperature=0.0))
    for event in events:
        if isinstance(event, TextDelta):
            break
    events.close()
    idle(session)
    assert session._scheduler.stats().finished["cancelled"] >= 1
    assert ask(session, ASK)[0] == demo_llm.chat(ASK, GREEDY).text


def test_stop_strings(session: ChatSession) -> None:
    text, _ = ask(session, ASK)
    word = text.split()[3]
    stopped, end = ask(session, ASK, params=SamplingParams(temperature=0.0, max_tokens=24, stop=(word,)))
    assert stopped == text[: text.index(word)]
    assert end.reason == "stop"


def test_a_forced_call(session: ChatSession) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=200)
    said, ended = Said(), 0
    for event in session.answer(ASK, params, [TOOL], None, forced=True):
        ended += isinstance(event, ToolCallEnd)
        if not isinstance(event, AnswerEnd | Reading):
            said.add(event)
    assert ended == len(said.calls) >= 1
    assert {call["function"]["name"] for call in said.calls} == {"clock"}


def test_refusals(session: ChatSession) -> None:
    with pytest.raises(PromptError, match="the context holds 2048"):
        ask(session, [{"role": "user", "content": "word " * 3000}])
    with pytest.raises(PromptError, match="No messages"):
        ask(session, [])
    with pytest.raises(PromptError, match="variable messages cannot be set"):
        ask(session, ASK, variables={"messages": []})


def test_a_failed_read_is_this_answers_alone(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, demo_llm: LLM
) -> None:
    def fail(*_: object) -> None:
        raise ReadError("experts/layer_0.bin: the drive is gone")

    monkeypatch.setattr(session.llm.engine, "step", fail)
    with pytest.raises(ReadError, match="the drive is gone"):
        ask(session, [{"role": "user", "content": "something new"}])
    monkeypatch.undo()
    assert ask(session, ASK)[0] == demo_llm.chat(ASK, GREEDY).text


def test_a_dead_thread_is_noticed(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(demo_bundle, memory="2GiB", context=256, prefix_cache="1MiB") as llm:
        monkeypatch.setattr("threading.excepthook", lambda args: None)
        with ChatSession(llm, PrefixCache(1 << 20, llm.engine.identity)) as session:
            monkeypatch.setattr(llm.engine, "step", lambda *_: 1 / 0)
            with pytest.raises(RuntimeError, match="inference thread has died"):
                ask(session, ASK)
