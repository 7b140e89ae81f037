"""Structured output through the public LLM, with the demo model."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from flashmoe import StructuredOutput
from flashmoe.errors import StructureError

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_chat_answers_by_a_schema(demo_llm: Any) -> None:
    params = demo_llm.sampling_params(temperature=1.0, max_tokens=200, seed=3)
    messages = [{"role": "user", "content": "Who are you?"}]
    answer = demo_llm.chat(messages, params, structured=StructuredOutput.json_schema(SCHEMA))
    assert answer.finish_reason == "stop"
    assert set(json.loads(answer.text)) == {"name", "age"}


@pytest.mark.parametrize("seed", range(5))
def test_patterns_choices_and_grammars(demo_llm: Any, seed: int) -> None:
    params = demo_llm.sampling_params(temperature=1.0, max_tokens=100, seed=seed)
    forms = (
        (StructuredOutput.regex(r"[A-Z]{2}-\d{4}"), r"[A-Z]{2}-\d{4}"),
        (StructuredOutput.choice(["red", "green", "red green"]), "red|green|red green"),
        (StructuredOutput.lark('start: N ("+" N)~1..3\nN: /[0-9]{1,3}/'), r"\d{1,3}(\+\d{1,3}){1,3}"),
    )
    for form, pattern in forms:
        answer = demo_llm.generate("Once", params, structured=form)
        assert (answer.finish_reason, bool(re.fullmatch(pattern, answer.text))) == ("stop", True)


def test_max_tokens_leave_a_prefix(demo_llm: Any) -> None:
    form = StructuredOutput.json_schema(SCHEMA)
    whole, part = (
        demo_llm.generate("Once", demo_llm.sampling_params(seed=1, max_tokens=n), structured=form)
        for n in (200, 6)
    )
    assert (whole.finish_reason, part.finish_reason) == ("stop", "length")
    assert whole.text.startswith(part.text)
    assert len(part.token_ids) == 6


def test_the_same_seed_gives_the_same_answer_and_no_form_the_models_own(demo_llm: Any) -> None:
    params = demo_llm.sampling_params(seed=5, max_tokens=60)
    forms = (StructuredOutput.json_object(), StructuredOutput.json_object(), None)
    first, second, free = (demo_llm.generate("Once", params, structured=form).token_ids for form in forms)
    assert first == second != free
    anything = StructuredOutput.regex(r"(?s:.*)")
    assert demo_llm.generate("Once", params, structured=anything).token_ids == free


def test_a_form_that_cannot_be_used_is_refused_before_anything_is_computed(demo_llm: Any) -> None:
    demo_llm.generate("Once", demo_llm.sampling_params(max_tokens=2))
    before = demo_llm.stats()["prompt_tokens"]
    with pytest.raises(StructureError, match="uniqueItems"):
        demo_llm.generate("Once upon a time", structured=StructuredOutput.json_schema({"uniqueItems": True}))
    assert demo_llm.stats()["prompt_tokens"] == before
