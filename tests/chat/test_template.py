"""Chat templates: Hugging Face's rendering rules, the sandbox, and errors of one line.

The expected texts were checked once against transformers 5.23 (render_jinja_template) on the same templates.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashmoe.chat.template import ChatTemplate
from flashmoe.errors import BundleError, PromptError

WriteJson = Callable[[str, object], Path]
USER = [{"role": "user", "content": "Hi"}]

# What published templates use: trimmed blocks, namespace, macro, neighbours in a loop, break, tojson.
CHATML = """\
{%- macro line(text) %}
[{{ text }}]
{%- endmacro %}
{%- set ns = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% endif %}
    {% if message.role == 'stop' %}
        {% break %}
    {% endif %}
<|{{ message.role }}|>{{ message.content }}{{ line(ns.count) }}
    {% set ns.count = ns.count + 1 %}
    {% if loop.previtem is defined and loop.previtem.role == message.role %}
(again)
    {% endif %}
    {% for call in message.tool_calls or [] %}
        {% for name, value in call.function.arguments | items %}
{{ name }}={{ value | tojson }}
        {% endfor %}
    {% endfor %}
{% endfor %}
{% if tools %}
{{ tools | tojson }}
{% endif %}
{% if add_generation_prompt %}
<|assistant|>{{ '' if enable_thinking is defined and not enable_thinking else '<think>' }}
{% endif %}
"""


def render(messages: list[dict[str, Any]], source: str = CHATML, **kwargs: Any) -> str:
    return ChatTemplate(source, "test.jinja", {"eos_token": "</s>"}).render(messages, **kwargs)


def test_blocks_are_trimmed_and_the_generation_prompt_is_on() -> None:
    assert render(USER) == "<|user|>Hi[0]\n<|assistant|><think>\n"


def test_keywords_reach_the_template() -> None:
    assert render(USER, enable_thinking=False) == "<|user|>Hi[0]\n<|assistant|>\n"
    assert render(USER, add_generation_prompt=False) == "<|user|>Hi[0]\n"


def test_loop_controls_and_neighbours() -> None:
    roles = ("user", "skip", "user", "user", "stop", "user")
    text = render([{"role": role, "content": "x"} for role in roles], add_generation_prompt=False)
    assert text == "<|user|>x[0]\n<|user|>x[1]\n<|user|>x[2]\n(again)\n"


def test_tojson_keeps_unicode_and_markup() -> None:
    tools = [{"name": "größe", "note": "<b> & 'q' \"d\""}]
    assert '[{"name": "größe", "note": "<b> & \'q\' \\"d\\""}]' in render(USER, tools=tools)


def test_tojson_takes_the_arguments_of_json_dumps() -> None:
    source = "{{ value | tojson(indent=2, sort_keys=true) }}|{{ value | tojson(separators=(',', ':')) }}"
    assert render(USER, source, value={"b": 1, "a": "é"}) == '{\n  "a": "é",\n  "b": 1\n}|{"b":1,"a":"é"}'


@pytest.mark.parametrize(
    "arguments", [{"city": "Zürich", "n": [1, None]}, '{"city": "Z\\u00fcrich", "n": [1, null]}']
)
def test_tool_call_arguments_may_be_json_text(arguments: object) -> None:
    messages = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }
    ]
    before = copy.deepcopy(messages)
    assert 'city="Zürich"\nn=[1, null]\n' in render(messages)
    assert messages == before


@pytest.mark.parametrize("arguments", ["{", "[1]", '"x"'])
def test_tool_call_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    with pytest.raises(PromptError, match="tool call 'f'"):
        render([{"role": "assistant", "content": "", "tool_calls": calls}])


def test_empty_tool_call_arguments_are_an_empty_object() -> None:
    calls = [{"function": {"name": "f", "arguments": ""}}]
    assert "=" not in render([{"role": "assistant", "content": "", "tool_calls": calls}])


def test_generation_blocks_are_transparent() -> None:
    source = "{% generation %}{{ messages[0].content }}{% endgeneration %}!"
    assert render(USER, source) == "Hi!"


def test_special_tokens_are_variables() -> None:
    assert render(USER, "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}") == "Hi</s>"


def test_strftime_now_gives_the_date() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render(USER, "{{ strftime_now('%Y-%m-%d') }}"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('No user\n query found.') }}", "No user query found."),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% for a in 'x' | items %}{% endfor %}", "mapping"),
    ],
)
def test_a_template_that_refuses_is_a_one_line_prompt_error(source: str, reason: str) -> None:
    with pytest.raises(PromptError, match=r"^test\.jinja cannot render") as caught:
        render(USER, source)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.x }}",
        "{% include 'x' %}",
        "{{ range(1000000000) | list }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(PromptError):
        render(USER, source)


def test_a_template_with_a_syntax_error_is_refused() -> None:
    with pytest.raises(BundleError, match=r"^test\.jinja is no valid template"):
        render(USER, "{% if %}")


def test_the_file_wins_over_the_tokenizer_config(tmp_path: Path, write_json: WriteJson) -> None:
    write_json("tokenizer_config.json", {"chat_template": "config", "eos_token": {"content": "</s>"}})
    assert ChatTemplate.from_dir(tmp_path).render(USER) == "config"
    (tmp_path / "chat_template.jinja").write_text("file{{ eos_token }}")
    assert ChatTemplate.from_dir(tmp_path).render(USER) == "file</s>"


def test_a_list_of_named_templates_gives_its_default(tmp_path: Path, write_json: WriteJson) -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    write_json("tokenizer_config.json", {"chat_template": named})
    assert ChatTemplate.from_dir(tmp_path).render(USER) == "yes"


def test_no_template_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no chat_template\.jinja.*--raw"):
        ChatTemplate.from_dir(tmp_path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="cannot be read"):
        ChatTemplate.from_dir(tmp_path)


def test_the_demo_template_renders_a_tool_conversation(demo_bundle: Path) -> None:
    template = ChatTemplate.from_dir(demo_bundle)
    call = {"function": {"name": "get_weather", "arguments": json.dumps({"city": "Zürich"})}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
    ]
    text = template.render(messages, tools=[{"type": "function", "function": {"name": "get_weather"}}])
    for part in ("Weather?", "get_weather", "Zürich", "sunny"):
        assert part in text
