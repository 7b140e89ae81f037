"""OpenAI's Responses API through OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from jsonschema import validate
from openai import BadRequestError, NotFoundError, OpenAI
from tests.server.conftest import KEY, Running

from flashmoe.errors import ReadError, RequestError
from flashmoe.server.responses_store import ResponseStore
from flashmoe.server.responses_types import PromptRequest, conversation, items_of

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Oslo", "Rome"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "strict": False,
}
PERSON: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "tags": {"type": "array", "items": {"enum": ["a"]}, "maxItems": 2},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
FORM: Any = {"format": {"type": "json_schema", "name": "person", "strict": True, "schema": PERSON}}


@pytest.fixture
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)


def given(**more: Any) -> dict[str, Any]:
    asked = {"model": "demo", "input": "Tell me a story about a mouse.", "temperature": 0.0}
    return asked | {"max_output_tokens": 24} | more


def ask(client: OpenAI, **more: Any) -> Any:
    return client.responses.create(**given(**more))


def test_an_answer(client: OpenAI) -> None:
    answer = ask(client, instructions="You are brief.", metadata={"a": "b"})
    assert (answer.object, answer.model, answer.status) == ("response", "demo", "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"
    (message,) = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")
    assert len(answer.output_text) > 20
    assert answer.usage.output_tokens == 24
    assert answer.usage.total_tokens == answer.usage.input_tokens + 24
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert (answer.metadata, answer.instructions, answer.temperature) == ({"a": "b"}, "You are brief.", 0.0)
    chat = client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": given()["input"]},
        ],
        temperature=0.0,
        max_tokens=24,
    )
    assert chat.choices[0].message.content == answer.output_text
    counted = client.responses.input_tokens.count(input=given()["input"], instructions="You are brief.")
    assert counted.input_tokens == answer.usage.input_tokens


def kinds(events: list[Any]) -> list[str]:
    """Types of events, runs of the same delta as one."""
    names: list[str] = []
    for event in events:
        name = event.type.removeprefix("response.")
        if not (names and names[-1] == name and name.endswith(".delta")):
            names.append(name)
    return names


TEXT_EVENTS = ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"]


def test_a_stream_is_the_same_answer(client: OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    whole = ask(client, include=include, top_logprobs=2)
    events = list(client.responses.create(stream=True, include=include, **given(top_logprobs=2)))
    expected = ["created", "in_progress", "output_item.added", *TEXT_EVENTS, "output_item.done", "incomplete"]
    assert kinds(events) == expected
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas: list[Any] = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text
    entries = [entry for event in deltas for entry in event.logprobs]
    final: Any = events[-1]
    part = final.response.output[0].content[0]
    assert [entry.token for entry in entries] == [entry.token for entry in part.logprobs]
    assert [e.logprob for e in part.logprobs] == [e.logprob for e in whole.output[0].content[0].logprobs]
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)
    assert final.response.output_text == whole.output_text
    assert final.response.usage.output_tokens == 24
    first: Any = events[0]
    assert (first.response.status, first.response.output, first.response.usage) == ("in_progress", [], None)


def test_the_streaming_helper(client: OpenAI) -> None:
    from pydantic import BaseModel, ConfigDict

    class Person(BaseModel):
        model_config = ConfigDict(extra="forbid")
        name: str
        age: int

    with client.responses.stream(**given(max_output_tokens=300), text_format=Person) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    if final.status == "completed":  # greedy decoding of a toy model may write one string for ever
        assert isinstance(final.output_parsed, Person)
    assert snapshots[-1] == final.output_text


def test_thinking_is_an_item_of_its_own(client: OpenAI) -> None:
    events = list(client.responses.create(stream=True, **given(reasoning={"effort": "high"})))
    final: Any = events[-1]
    item = final.response.output[0]
    # The toy model never ends its thoughts.
    assert (item.type, item.status, item.summary) == ("reasoning", "incomplete", [])
    assert len(item.content[0].text) > 20
    assert final.response.usage.output_tokens_details.reasoning_tokens == 24
    deltas = ["content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done"]
    assert kinds(events)[2:-1] == ["output_item.added", *deltas, "output_item.done"]
    answer = ask(client, input=[item.model_dump(exclude_none=True), {"role": "user", "content": "Go on."}])
    assert answer.output_text
    assert ask(client, reasoning={"effort": "none"}).output[0].type == "message"


def test_a_tool_round_trip(client: OpenAI) -> None:
    forced = given(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_output_tokens=200)
    first = client.responses.create(**forced)
    call: Any = first.output[-1]
    assert (first.status, call.type, call.name) == ("completed", "function_call", "get_weather")
    validate(json.loads(call.arguments), WEATHER["parameters"])
    with client.responses.stream(**forced) as stream:
        events = list(stream)
        final = stream.get_final_response()
    calls = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done"]
    assert kinds(events)[-5:] == [*calls, "output_item.done", "completed"]
    assert final.output[-1].to_dict()["arguments"] == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"sky": "clear"}'}
    by_id = ask(client, previous_response_id=first.id, input=[result], tools=[WEATHER])
    items = [
        {"role": "user", "content": given()["input"]},
        *(item.to_dict() for item in first.output),
        result,
    ]
    by_items = ask(client, input=items, tools=[WEATHER])
    assert by_id.output_text == by_items.output_text
    assert by_id.usage.input_tokens == by_items.usage.input_tokens > first.usage.input_tokens  # type: ignore[union-attr]
    references = [items[0], {"type": "item_reference", "id": call.id}, result]
    assert ask(client, input=references, tools=[WEATHER]).usage.input_tokens <= by_items.usage.input_tokens
    named = {"type": "function", "name": "get_weather"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [named]}
    other = WEATHER | {"name": "other"}
    for choice in (named, allowed):
        again = client.responses.create(**forced | {"tools": [other, WEATHER], "tool_choice": choice})
        assert again.output[-1].to_dict()["name"] == "get_weather"


def test_a_call_that_is_cut_comes_out_as_text(client: OpenAI) -> None:
    answer = ask(client, tools=[WEATHER], tool_choice="required", max_output_tokens=6)
    assert answer.status == "incomplete"
    assert answer.output_text.startswith("<tool_call>")


def test_json(client: OpenAI) -> None:
    for seed in range(3):
        answer = ask(client, text=FORM, temperature=1.0, max_output_tokens=300, extra_body={"seed": seed})
        assert answer.status == "completed"
        validate(json.loads(answer.output_text), PERSON)
    answer = ask(client, text={"format": {"type": "json_object"}}, max_output_tokens=300)
    if answer.status == "completed":
        assert isinstance(json.loads(answer.output_text), dict)


def test_a_conversation_goes_on(client: OpenAI) -> None:
    first = ask(client, input="Tell me of the sea, slowly and in many words. " * 20, instructions="Be brief.")
    second = ask(client, previous_response_id=first.id, input="And then?")
    assert second.previous_response_id == first.id
    # Instructions are not carried over, so the prompt differs from its start on.
    assert second.usage.input_tokens > first.usage.input_tokens
    third = ask(client, previous_response_id=second.id, input="And then?")
    assert third.usage.input_tokens_details.cached_tokens > 0.7 * third.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    items = client.responses.input_items.list(third.id).data
    assert [item.to_dict()["content"] for item in items] == [[{"type": "input_text", "text": "And then?"}]]
    client.responses.delete(first.id)
    with pytest.raises(NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(NotFoundError):
        client.responses.delete(first.id)
    assert ask(client, previous_response_id=second.id, input="And then?").output_text == third.output_text


def test_what_is_not_stored_cannot_be_continued(client: OpenAI) -> None:
    answer = ask(client, store=False)
    assert answer.store is False
    with pytest.raises(NotFoundError):
        client.responses.retrieve(answer.id)
    with pytest.raises(BadRequestError, match="not found") as caught:
        ask(client, previous_response_id=answer.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


def test_the_store_is_bounded() -> None:
    def response(number: int, text: str = "x") -> dict[str, Any]:
        return {
            "id": f"resp_{number}",
            "output": [{"id": f"msg_{number}", "type": "message", "content": text}],
        }

    store = ResponseStore(most_nbytes=2000, most_responses=3)
    for number in range(5):
        store.put(response(number), [], [])
    assert len(store) == 3
    assert store.get("resp_1") is None
    assert store.item("msg_4") == response(4)["output"][0]
    assert store.item("msg_1") is None
    assert store.get("resp_2") is not None, "which makes it the last to go"
    store.put(response(5, "x" * 600), [], [])
    assert store.get("resp_3") is None
    store.put(response(6, "x" * 2000), [], [])
    assert store.get("resp_6") is None
    assert store.delete("resp_5")
    assert not store.delete("resp_5")
    for number in range(7, 20):
        store.put(response(number, "x" * 500), [{"content": "y" * 300}], [])
    assert 0 < len(store) < 3


def test_a_failure_midway_ends_the_stream_with_it(
    server: Running, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, step = [0], server.service.llm.engine.step

    def failing(parts: Any, wanted: Any) -> Any:
        steps[0] += 1
        if steps[0] > 5:
            raise ReadError("layer-003.bin: cannot be read")
        return step(parts, wanted)

    monkeypatch.setattr(server.service.llm.engine, "step", failing)
    events: list[Any] = list(client.responses.create(stream=True, **given()))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    assert "layer-003.bin" in events[-1].response.error.message
    assert [event.sequence_number for event in events] == list(range(len(events)))
    monkeypatch.undo()
    assert ask(client).output_text


def test_items_become_messages() -> None:
    items: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "g", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "2"}]},
        {"role": "assistant", "content": "Done."},
    ]

    def call(name: str, function: str, arguments: str) -> dict[str, Any]:
        return {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}

    assert conversation("You are kind.", items) == [
        {"role": "system", "content": "You are kind.\n\nBe brief."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Hm.",
            "tool_calls": [call("a", "f", "{}"), call("b", "g", '{"x": 1}')],
        },
        {"role": "tool", "content": "1", "tool_call_id": "a"},
        {"role": "tool", "content": "2", "tool_call_id": "b"},
        {"role": "assistant", "content": "Done."},
    ]
    with pytest.raises(RequestError, match="which is not known"):
        items_of(PromptRequest(input=[{"type": "item_reference", "id": "msg_x"}]), lambda name: None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"input": []}, "input is missing"),
        ({"input": [5]}, "input"),
        ({"input": [{"role": "user"}]}, "no text"),
        ({"input": [{"role": "judge", "content": "x"}]}, "must be user, assistant, system or developer"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "no text"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "is of type 'web_search_call'"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "without arguments"),
        ({"tools": [{"type": "web_search"}]}, "only functions"),
        ({"tools": [{"type": "function"}]}, "no function name"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "not among the tools"),
        ({"text": {"format": {"type": "xml"}}}, "'xml' is unknown"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "give a JSON Schema"),
        ({"text": {"format": "json"}}, "must be an object"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1.0}, "temperature must lie in"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        ({"input": "word " * 4000}, "shorten it or raise --context"),
        ({"previous_response_id": "resp_x"}, "not found"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(client: OpenAI, more: Any, message: str, stream: bool) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        ask(client, stream=stream, **more)
    body: Any = caught.value.body
    assert body["type"] == "invalid_request_error"
    assert "\n" not in body["message"]


def test_malformed_bodies(server: Running) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    for body in (b"", b"{", b"null", b'{"input": 5}', json.dumps(given(input=deep)).encode()):
        answer = httpx.post(server.url + "/v1/responses", content=body, headers=headers)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["message"]
    assert httpx.get(server.url + "/v1/responses/resp_x").status_code == 401
