"""Reasoning first: the form begins behind a marker."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from flashmoe.chat.structured import GrammarVocabulary, StructuredOutput, compile_structure

Allowed, Walk = Callable[[Any], set[int]], Callable[[Any, str], str]
FORM = StructuredOutput.choice(["yes", "no"])
EOS = {0, 2}


def test_what_comes_before_is_free_and_cannot_end_the_answer(
    vocabulary: GrammarVocabulary, allowed: Allowed, walk: Walk
) -> None:
    constraint = compile_structure(FORM.begin_after("</think>"), vocabulary, {77})
    assert allowed(constraint) == set(range(vocabulary.tokenizer.vocab_size)) - EOS - {77}
    assert walk(constraint, 'Any {text, é <think> </thin k> "at" all.') == ""
    assert not allowed(constraint) & EOS
    assert not constraint.is_done


@pytest.mark.parametrize("marker", ["</think>", "ANSWER: ", "日本", "aab"])
@pytest.mark.parametrize("blanks", ["", " ", "\n\n"])
def test_behind_the_marker_the_form_is_kept(
    marker: str, blanks: str, vocabulary: GrammarVocabulary, allowed: Allowed, walk: Walk
) -> None:
    constraint = compile_structure(FORM.begin_after(marker), vocabulary)
    assert walk(constraint, f"Hm. a aa aa{marker}{blanks}") == ""
    assert not constraint.is_done
    assert not allowed(constraint) & EOS
    assert walk(constraint, "xyz") == "xyz"
    assert walk(constraint, "yes") == ""
    assert constraint.is_done
    assert allowed(constraint) == EOS


def test_the_marker_may_be_one_token_or_spelt_out(
    vocabulary: GrammarVocabulary, allowed: Allowed, walk: Walk
) -> None:
    one = vocabulary.tokenizer.token_id("</think>")
    assert one is not None
    for ids in ([one], [vocabulary.tokenizer.token_id(c) for c in "</think>"]):
        constraint = compile_structure(FORM.begin_after("</think>"), vocabulary)
        for token_id in ids:
            assert token_id in allowed(constraint)
            constraint.accept(token_id)
        assert walk(constraint, "no") == ""


def test_no_token_reaches_over_the_marker(vocabulary: GrammarVocabulary, allowed: Allowed) -> None:
    tokens = vocabulary.tokenizer.token_bytes(vocabulary.vocab_size)
    constraint = compile_structure(FORM.begin_after("</"), vocabulary)
    over = {i for i, token in enumerate(tokens) if token.startswith(b"</") and token[2:].strip()}
    assert over
    assert not allowed(constraint) & over
    constraint.accept(tokens.index(b"<"))
    over = {i for i, token in enumerate(tokens) if token.startswith(b"/") and token[1:].strip()}
    assert over
    assert not allowed(constraint) & over


def test_blanks_between_are_few(vocabulary: GrammarVocabulary, allowed: Allowed, walk: Walk) -> None:
    constraint = compile_structure(FORM.begin_after("</think>"), vocabulary)
    assert walk(constraint, "</think>") == ""
    line = vocabulary.tokenizer.encode("\n")[0]
    for _ in range(4):
        assert line in allowed(constraint)
        constraint.accept(line)
    assert line not in allowed(constraint)


def test_the_demo_model_reasons_first(demo_llm: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = StructuredOutput.json_schema(schema).begin_after(".")
    for seed in range(10):
        params = demo_llm.sampling_params(temperature=1.0, max_tokens=400, seed=seed)
        answer = demo_llm.chat([{"role": "user", "content": "Hi"}], params, structured=form)
        assert answer.finish_reason == "stop"
        free, _, rest = answer.text.partition(".")
        assert free
        assert json.loads(rest)["n"] in (1, 2)
