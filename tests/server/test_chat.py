"""OpenAI's chat and completions through OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from jsonschema import validate
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI
from tests.server.conftest import KEY, Running

from flashmoe.chat.prompts import Prompt

MESSAGES: Any = [{"role": "user", "content": "Tell me a story about a mouse."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Oslo", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)


def ask(client: OpenAI, **given: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "demo", "messages": MESSAGES, "temperature": 0.0, "max_tokens": 24} | given
    )


def test_an_answer(client: OpenAI) -> None:
    answer = ask(client)
    assert answer.object == "chat.completion"
    assert answer.model == "demo"
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert len(choice.message.content) > 20
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    assert ask(client).choices[0].message.content == choice.message.content


def test_a_stream_is_the_same_answer(client: OpenAI) -> None:
    whole = ask(client, logprobs=True, top_logprobs=3)
    text, entries, last, usage = "", [], None, None
    for chunk in ask(
        client, logprobs=True, top_logprobs=3, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            entries += choice.logprobs.content if choice.logprobs else []
            last = choice.finish_reason or last
    assert text == whole.choices[0].message.content
    assert last == "length"
    assert usage is not None
    assert usage.completion_tokens == 24
    expected = whole.choices[0].logprobs.content
    assert [(e.token, e.logprob) for e in entries] == [(e.token, e.logprob) for e in expected]
    assert "".join(e.token for e in expected) == text
    assert all(len(e.top_logprobs) == 3 and e.top_logprobs[0].logprob >= e.logprob for e in expected)


def test_stop_seed_and_several_answers(client: OpenAI) -> None:
    text = ask(client).choices[0].message.content
    word = text.split()[3]
    stopped = ask(client, stop=[word, "never comes"]).choices[0]
    assert stopped.message.content == text[: text.index(word)]
    assert stopped.finish_reason == "stop"
    given = {"temperature": 1.0, "seed": 7, "n": 3}
    several = [choice.message.content for choice in ask(client, **given).choices]
    assert several == [choice.message.content for choice in ask(client, **given).choices]
    assert len(set(several)) == 3
    parts = ["", "", ""]
    for chunk in ask(client, **given, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
    assert parts == several


@pytest.mark.parametrize(
    ("standard", "extra"),
    [
        ({"presence_penalty": 1.5}, {}),
        ({"frequency_penalty": 1.5}, {}),
        ({}, {"repetition_penalty": 1.5}),
        ({"temperature": 1.0, "seed": 5, "top_p": 0.5}, {"top_k": 7, "min_p": 0.1}),
    ],
)
def test_sampling_is_as_asked(
    client: OpenAI, demo_llm: Any, standard: dict[str, Any], extra: dict[str, Any]
) -> None:
    params = demo_llm.sampling_params(**{"temperature": 0.0, "max_tokens": 24} | standard | extra)
    expected = demo_llm.chat(MESSAGES, params).text
    assert ask(client, **standard, extra_body=extra).choices[0].message.content == expected
    assert expected != ask(client).choices[0].message.content


def test_thinking_is_split_from_the_answer(client: OpenAI) -> None:
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    message = ask(client, extra_body=thinking).choices[0].message
    # The toy model never ends its thoughts: all of it is reasoning, nothing is lost.
    assert (message.content or "") + message.reasoning_content
    assert "<think>" not in (message.content or "")
    plain = ask(client, reasoning_effort="none").choices[0].message
    assert not hasattr(plain, "reasoning_content")


def test_a_tool_round_trip(client: OpenAI) -> None:
    first = ask(
        client, tools=[WEATHER, CLOCK], tool_choice="required", max_tokens=200, temperature=1.0, seed=3
    )
    assert first.choices[0].finish_reason == "tool_calls"
    calls = first.choices[0].message.tool_calls
    for call in calls:
        assert call.function.name in ("get_weather", "clock")
        arguments = json.loads(call.function.arguments)
        if call.function.name == "get_weather":
            validate(arguments, WEATHER["function"]["parameters"])
    history = [
        *MESSAGES,
        first.choices[0].message.model_dump(exclude_none=True),
        *({"role": "tool", "tool_call_id": call.id, "content": '{"sky": "clear"}'} for call in calls),
    ]
    answer = ask(client, messages=history, tools=[WEATHER, CLOCK])
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_named_tool_streams(client: OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    given = {"tools": [WEATHER, CLOCK], "tool_choice": named, "max_tokens": 200, "parallel_tool_calls": False}
    whole = ask(client, **given)
    name, arguments, reason = "", "", None
    for chunk in ask(client, **given, stream=True):
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                assert call.index == 0
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    (call,) = whole.choices[0].message.tool_calls
    assert (name, arguments, reason) == ("get_weather", call.function.arguments, "tool_calls")
    validate(json.loads(arguments), WEATHER["function"]["parameters"])


def test_a_call_that_is_cut_comes_out_as_text(client: OpenAI) -> None:
    choice = ask(client, tools=[WEATHER], tool_choice="required", max_tokens=6).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert choice.message.content.startswith("<tool_call>")


CALL = """<tool_call>
<function=get_weather>
<parameter=city>
{city}
</parameter>
<parameter=days>
{days}
</parameter>
</function>
</tool_call>"""


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("No call at all.", True),
        ("Let me look. " + CALL.format(city="Oslo", days=3), True),
        (CALL.format(city="Rome", days=7), True),
        (CALL.format(city="Rome", days=8), False),
        (CALL.replace("get_weather", "get_whether").format(city="Rome", days=1), False),
    ],
)
def test_strict_tools_may_be_left_alone_but_not_misused(server: Running, text: str, allowed: bool) -> None:
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    service, llm = server.service, server.service.llm
    structure = service.prompts.tool_structure(Prompt([1], tools=[strict]), None, forced=False)
    assert structure is not None
    constraint = llm.constraint(structure, llm.sampling_params())
    taken = []
    for token in llm.tokenizer.encode(text, add_special_tokens=False):
        if not constraint.mask()[token // 32] >> np.uint32(token % 32) & 1:
            break
        constraint.accept(token)
        taken.append(token)
    else:
        end = min(llm.tokenizer.stop_ids)
        assert bool(constraint.mask()[end // 32] >> np.uint32(end % 32) & 1) == allowed
        return
    assert not allowed, f"stopped after {llm.tokenizer.decode(taken)!r}"


def test_strict_tools_do_not_stop_an_answer(client: OpenAI) -> None:
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    choice = ask(client, tools=[strict]).choices[0]
    assert choice.message.content or choice.message.tool_calls


def test_json(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}
    for seed in range(4):
        choice = ask(client, response_format=form, max_tokens=300, temperature=1.0, seed=seed).choices[0]
        assert choice.finish_reason == "stop"
        validate(json.loads(choice.message.content), schema)
    choice = ask(client, response_format={"type": "json_object"}, max_tokens=300).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    guided = ask(client, extra_body={"guided_choice": ["yes", "no"]}).choices[0].message.content
    assert guided in ("yes", "no")


def test_what_is_cached_is_counted(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "Tell me of the sea, slowly and in many words. " * 20}]
    cold = ask(client, messages=messages, max_tokens=4)
    again = [*messages, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And then?"}]
    warm = ask(client, messages=again, max_tokens=4)
    assert cold.usage.prompt_tokens_details.cached_tokens < 20
    assert warm.usage.prompt_tokens_details.cached_tokens > 0.9 * cold.usage.prompt_tokens


@pytest.mark.parametrize("thinking", [False, True])
def test_a_long_answer_is_cached_in_the_form_in_which_it_comes_back(
    server: Running, client: OpenAI, thinking: bool
) -> None:
    given = {
        "max_tokens": 300,
        "temperature": 0.9,
        "seed": 5,
        "reasoning_effort": "high" if thinking else "none",
    }
    talks: list[Any] = [[{"role": "user", "content": f"Tell me story {i} of a mouse."}] for i in range(4)]
    for messages in talks:
        message = ask(client, messages=messages, **given).choices[0].message
        messages += [message.model_dump(exclude_none=True), {"role": "user", "content": "And then?"}]
        server.wait_until_idle()
    text = "And then?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    new = server.service.llm.tokenizer.encode(text, add_special_tokens=False)
    for messages in talks:
        usage = ask(client, messages=messages, max_tokens=2, seed=5, temperature=0.0).usage
        cached = usage.prompt_tokens_details.cached_tokens
        assert usage.prompt_tokens - cached == len(new), "nothing else is processed"
        assert thinking or cached > 0.9 * usage.prompt_tokens


def test_tool_calls_are_cached_in_the_form_in_which_they_come_back(server: Running, client: OpenAI) -> None:
    forced = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 200, "parallel_tool_calls": False}
    message = ask(client, **forced).choices[0].message
    server.wait_until_idle()
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "clear"}
    history = [*MESSAGES, message.model_dump(exclude_none=True), result]
    usage = ask(client, messages=history, tools=[WEATHER], max_tokens=2).usage
    assert usage.prompt_tokens_details.cached_tokens > 0.9 * usage.prompt_tokens


def test_completions(client: OpenAI) -> None:
    given: Any = {"model": "demo", "temperature": 0.0, "max_tokens": 12}
    whole = client.completions.create(prompt=["Once upon", "The sea"], **given)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    parts = ["", ""]
    for chunk in client.completions.create(prompt=["Once upon", "The sea"], stream=True, **given):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    assert parts == [choice.text for choice in whole.choices]
    by_ids = client.completions.create(prompt=[5, 17, 300], logprobs=2, **given).choices[0]
    assert by_ids.logprobs is not None
    assert by_ids.logprobs.tokens is not None
    assert "".join(by_ids.logprobs.tokens) == by_ids.text
    default = client.completions.create(model="demo", prompt="Once", temperature=0.0)
    assert default.usage is not None
    assert default.usage.completion_tokens == 16


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1.0}, "temperature must lie in"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "no role"}]}, "has no role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text can be read"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias is not supported"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 99}, "n: "),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice 'sometimes' is unknown"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [{"type": "function", "function": {}}]}, "has no function name"),
        ({"tools": [WEATHER], "tool_choice": {"function": {"name": "x"}}}, "not among the tools"),
        ({"response_format": {"type": "xml"}}, "'xml' is unknown"),
        ({"response_format": {"type": "json_schema"}}, "give a JSON Schema"),
        ({"extra_body": {"guided_regex": "("}}, "regular expression cannot be used"),
        ({"messages": [{"role": "user", "content": "word " * 4000}]}, "shorten it or raise --context"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(client: OpenAI, given: Any, message: str, stream: bool) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        ask(client, stream=stream, **given)
    body: Any = caught.value.body
    assert body["type"] == "invalid_request_error"
    assert "\n" not in body["message"]


def test_an_unsupported_schema_keyword_is_named(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "contains": {"type": "integer"}}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(BadRequestError, match="contains"):
        ask(client, response_format=form)


@pytest.mark.parametrize("key", ["wrong", "sesame2"])
def test_a_wrong_key(server: Running, key: str) -> None:
    with pytest.raises(AuthenticationError, match="API key is missing or wrong"):
        OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0).models.list()
