"""Anthropic's API through Anthropic's own client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from anthropic import Anthropic, AuthenticationError, BadRequestError
from jsonschema import validate
from tests.server.conftest import KEY, Running

MESSAGES: Any = [{"role": "user", "content": "Tell me a story about a mouse."}]
GREEDY = {"temperature": 0.0}  # newer clients have no argument for it, the API has the field
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "maximum": 7}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def client(server: Running) -> Anthropic:
    return Anthropic(base_url=server.url, api_key=KEY, max_retries=0)


def ask(client: Anthropic, **given: Any) -> Any:
    return client.messages.create(
        **{"model": "demo", "messages": MESSAGES, "max_tokens": 24, "extra_body": GREEDY} | given
    )


def test_an_answer_and_its_stream(client: Anthropic) -> None:
    message = ask(client, system="You are brief.")
    (block,) = message.content
    assert (block.type, message.role, message.stop_reason) == ("text", "assistant", "max_tokens")
    assert len(block.text) > 20
    assert message.usage.output_tokens == 24
    given: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 24, "extra_body": GREEDY}
    with client.messages.stream(**given, system="You are brief.") as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == block.text
    assert final.content[0].model_dump(exclude_none=True) == block.model_dump(exclude_none=True)
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 24


def test_system_and_content_as_blocks(client: Anthropic) -> None:
    blocks = [{"type": "text", "text": "You are "}, {"type": "text", "text": "brief."}]
    content = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    assert (
        ask(client, system=blocks, messages=content).content == ask(client, system="You are brief.").content
    )


def test_a_stop_sequence(client: Anthropic) -> None:
    text = ask(client).content[0].text
    word = text.split()[3]
    message = ask(client, stop_sequences=["never comes", word])
    assert message.content[0].text == text[: text.index(word)]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", word)


def test_a_tool_round_trip(client: Anthropic) -> None:
    given: Any = {
        "tools": [WEATHER],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "max_tokens": 200,
    }
    message = ask(client, **given)
    assert message.stop_reason == "tool_use"
    call = message.content[-1]
    assert (call.type, call.name) == ("tool_use", "get_weather")
    validate(call.input, WEATHER["input_schema"])
    with client.messages.stream(
        **{"model": "demo", "messages": MESSAGES, "extra_body": GREEDY} | given
    ) as stream:
        final = stream.get_final_message()
    assert final.content[-1].input == call.input
    assert final.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Rain."}]}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in message.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
    ]
    answer = ask(client, messages=history, tools=[WEATHER])
    assert answer.content
    named = ask(client, **given | {"tool_choice": {"type": "tool", "name": "get_weather"}})
    assert named.content[-1].name == "get_weather"


def test_thinking(client: Anthropic) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    message = ask(client, thinking=thinking)
    # The toy model never ends its thoughts.
    assert "".join(getattr(b, "thinking", "") or getattr(b, "text", "") for b in message.content)
    given: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 24, "extra_body": GREEDY}
    with client.messages.stream(**given, thinking=thinking) as stream:
        final = stream.get_final_message()
    assert [b.type for b in final.content] == [b.type for b in message.content]
    assert ask(client, thinking={"type": "disabled"}).content == ask(client).content


def events_of(client: Anthropic, **given: Any) -> list[Any]:
    asked = {"model": "demo", "messages": MESSAGES, "max_tokens": 24, "extra_body": GREEDY} | given
    return list(client.messages.create(stream=True, **asked))


def kinds(events: list[Any]) -> list[str]:
    """Types of events, those of blocks with the block's or the delta's; runs of the same one as one."""
    names: list[str] = []
    for event in events:
        part = getattr(event, "content_block", None) or getattr(event, "delta", None)
        kind = getattr(part, "type", None)
        name = f"{event.type} {kind}" if kind else event.type
        if not names or names[-1] != name:
            names.append(name)
    return names


def test_a_stream_of_thoughts(client: Anthropic) -> None:
    events = events_of(client, thinking={"type": "enabled", "budget_tokens": 1024})
    assert kinds(events) == [
        "message_start",
        "content_block_start thinking",
        "content_block_delta thinking_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    thoughts = "".join(getattr(getattr(event, "delta", None), "thinking", "") for event in events)
    # Thoughts of an earlier turn are taken back.
    block = {"type": "thinking", "thinking": thoughts, "signature": ""}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": [block, {"type": "text", "text": "Yes."}]},
        {"role": "user", "content": "Go on."},
    ]
    assert ask(client, messages=history).content


def test_a_stream_of_tool_calls(client: Anthropic) -> None:
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    thinking = {"type": "disabled"}
    events = events_of(client, tools=[WEATHER], tool_choice=choice, max_tokens=200, thinking=thinking)
    assert kinds(events) == [
        "message_start",
        "content_block_start tool_use",
        "content_block_delta input_json_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    text = "".join(getattr(getattr(event, "delta", None), "partial_json", "") for event in events)
    validate(json.loads(text), WEATHER["input_schema"])
    assert events[-2].delta.stop_reason == "tool_use"
    assert events[-2].usage.output_tokens > 0
    assert [event.index for event in events if event.type.startswith("content_block")] == [0] * (
        len(events) - 3
    )


def test_a_call_that_is_cut_comes_out_as_text(client: Anthropic) -> None:
    message = ask(client, tools=[WEATHER], tool_choice={"type": "any"}, max_tokens=6)
    assert message.stop_reason == "max_tokens"
    assert message.content[0].text.startswith("<tool_call>")


def test_tokens_are_counted_as_they_are_used(client: Anthropic) -> None:
    counted = client.messages.count_tokens(model="demo", messages=MESSAGES, tools=[WEATHER])
    usage = ask(client, tools=[WEATHER], max_tokens=1).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "must be user or assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "no text"),
        ({"messages": [{"role": "user", "content": 5}]}, "a text or a list of blocks"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "only custom tools"),
        ({"tool_choice": {"type": "sometimes"}}, "is unknown"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"extra_body": {"temperature": -1.0}}, "temperature must lie in"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_requests(client: Anthropic, given: Any, message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        ask(client, **given)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"


def test_a_wrong_key_and_a_malformed_body(server: Running) -> None:
    with pytest.raises(AuthenticationError, match="API key"):
        ask(Anthropic(base_url=server.url, api_key="wrong", max_retries=0))
    answer = httpx.post(server.url + "/v1/messages", content=b"{", headers={"x-api-key": KEY})
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert json.loads(answer.text)["error"]["message"]
