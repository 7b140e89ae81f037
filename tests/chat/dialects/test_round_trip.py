"""What a template writes down for an earlier answer is read back as that answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flashmoe.chat.dialects import detect
from flashmoe.chat.template import ChatTemplate

Read = Callable[..., Any]
PUBLISHED = Path(__file__).parents[4] / "shared" / "templates"
NO_PARAMETERS = {"description": "A tool.", "parameters": {"type": "object", "properties": {}}}
USER = {"role": "user", "content": "What is the weather?"}
CALLS = [
    ("weather", {"city": 'Zürich </b> "q"', "days": 3, "tags": ["a", "{"], "options": {"a": None}}),
    ("now", {}),
]

words = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<[|｜"), max_size=20).map(str.strip)
arguments = st.fixed_dictionaries(
    {"city": st.text(st.characters(codec="utf-8"))},
    optional={
        "days": st.integers(),
        "exact": st.booleans(),
        "tags": st.lists(st.text() | st.integers() | st.none(), max_size=3),
        "options": st.dictionaries(st.text(), st.none() | st.booleans() | st.text(), max_size=3),
        "note": st.none(),
    },
)


def message(content: str, calls: list[tuple[str, Any]], reasoning: str | None = None) -> dict[str, Any]:
    """An assistant's message as OpenAI's API has it."""
    written = [
        {
            "id": f"call_{n}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for n, (name, arguments) in enumerate(calls)
    ]
    extra = {} if reasoning is None else {"reasoning_content": reasoning}
    return {"role": "assistant", "content": content, "tool_calls": written, **extra}


def answer_of(
    template: ChatTemplate, tools: list[Any], answer: dict[str, Any], **options: Any
) -> tuple[str, str]:
    """(the prompt that asks for the answer, the answer's text behind it without the end of the turn)."""
    prompt = template.render([USER], tools, **options)
    whole = template.render([USER, answer], tools, add_generation_prompt=False, **options)
    assert whole.startswith(prompt)
    return prompt, whole[len(prompt) :].rstrip("\n").removesuffix("<|im_end|>").removesuffix(
        "<｜end▁of▁sentence｜>"
    )


@given(content=words, reasoning=words, all_arguments=st.lists(arguments, min_size=1, max_size=3))
def test_the_demo_template(
    demo_template: ChatTemplate,
    tools: list[Any],
    read: Read,
    content: str,
    reasoning: str,
    all_arguments: list[dict[str, Any]],
) -> None:
    assume(not any("</parameter>" in a["city"] or "</function>" in a["city"] for a in all_arguments))
    calls = [("weather", a) for a in all_arguments]
    dialect = detect(demo_template.source)
    assert dialect is not None
    prompt, text = answer_of(demo_template, tools, message(content, calls, reasoning), enable_thinking=True)
    assert dialect.opens_reasoning(prompt)
    answer = read(dialect, text, range(0, 2000, 3), reasoning_open=True)
    assert (answer.reasoning, answer.text, answer.calls) == (reasoning, content, calls)


@pytest.fixture(scope="session")
def demo_template(demo_bundle: Path) -> ChatTemplate:
    return ChatTemplate.from_dir(demo_bundle)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published templates of ../shared are not here")
@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", CALLS),
        ("Qwen-Qwen3-0.6B", CALLS),
        ("Qwen3-Coder", CALLS),
        ("Qwen3.5-4B", CALLS),
        ("deepseek-ai-DeepSeek-V3.1", CALLS),
        ("openai-gpt-oss-120b", CALLS[:1]),  # its template writes the first call only
    ],
)
def test_published_templates(read: Read, tools: list[Any], name: str, calls: list[tuple[str, Any]]) -> None:
    template = ChatTemplate(
        (PUBLISHED / f"{name}.jinja").read_text(encoding="utf-8"), name, {"bos_token": "<s>"}
    )
    dialect = detect(template.source)
    assert dialect is not None
    described = [{**tool, "function": NO_PARAMETERS | tool["function"]} for tool in tools]
    prompt, text = answer_of(template, described, message("", calls))
    answer = read(dialect, text, range(len(text)), reasoning_open=dialect.opens_reasoning(prompt))
    assert (answer.reasoning, answer.text, answer.calls) == ("", "", calls)
