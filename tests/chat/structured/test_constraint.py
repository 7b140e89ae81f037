"""Masks over the demo model's vocabulary: what is allowed where, and which tokens may end an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from flashmoe.chat.structured import GrammarVocabulary, StructuredOutput, compile_structure
from flashmoe.engine.tokenizer import TextTokenizer
from flashmoe.errors import BundleError, StructureError

Allowed, Walk = Callable[[Any], set[int]], Callable[[Any, str], str]
EOS = {0, 2}


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (StructuredOutput.json_object(), '{"a": [1, {"b":null}]}', "[1]"),
        (StructuredOutput.json_schema({"type": "integer"}), "-12", "-"),
        (StructuredOutput.json_schema(True), "[true]", "yes"),
        (StructuredOutput.regex(r"\d{4}-\d\d"), "2026-11", "2026-1x"),
        (StructuredOutput.regex("a|ab|é{2}"), "éé", "é "),
        (StructuredOutput.choice(["red", 'say "hi"\n', "a|b", "日本"]), 'say "hi"\n', "re"),
        (StructuredOutput.choice(["日本"]), "日本", "日"),
        (StructuredOutput.lark('start: "a" start "b" | "-"'), "aa-bb", "aa-b"),
    ],
)
def test_a_form_takes_what_belongs_to_it_and_nothing_else(
    spec: StructuredOutput, good: str, bad: str, vocabulary: GrammarVocabulary, allowed: Allowed, walk: Walk
) -> None:
    taking, refusing = (compile_structure(spec, vocabulary) for _ in range(2))
    assert walk(taking, good) == ""
    assert allowed(taking) >= EOS
    walk(refusing, bad)
    assert not allowed(refusing) & EOS


def test_stop_tokens_are_allowed_exactly_where_the_text_may_end(
    vocabulary: GrammarVocabulary, allowed: Allowed, walk: Walk
) -> None:
    constraint = compile_structure(StructuredOutput.choice(["red", "red green"]), vocabulary)
    assert not allowed(constraint) & EOS
    assert walk(constraint, "red") == ""
    assert allowed(constraint) > EOS
    assert not constraint.is_done
    assert walk(constraint, " green") == ""
    assert constraint.is_done
    assert allowed(constraint) == EOS


def test_a_requests_own_stop_tokens_follow_the_same_rule(
    vocabulary: GrammarVocabulary, allowed: Allowed, walk: Walk
) -> None:
    letter = vocabulary.tokenizer.encode("a")[0]
    constraint = compile_structure(StructuredOutput.regex("b?a*"), vocabulary, {letter, 10**9})
    assert letter in allowed(constraint)
    assert letter in allowed(compile_structure(StructuredOutput.regex("a+"), vocabulary))
    assert letter not in allowed(compile_structure(StructuredOutput.regex("a+"), vocabulary, {letter}))


def test_strings_hold_no_special_and_no_unused_token(
    vocabulary: GrammarVocabulary, allowed: Allowed, walk: Walk
) -> None:
    constraint = compile_structure(StructuredOutput.json_schema({"type": "string"}), vocabulary)
    assert walk(constraint, '"a') == ""
    ids = allowed(constraint)
    assert len(ids) > 40_000
    assert not ids & vocabulary.tokenizer.special_ids
    assert max(ids) < vocabulary.tokenizer.vocab_size
    assert len(constraint.mask()) == -(-vocabulary.vocab_size // 32)


def test_half_a_character_may_be_a_token(vocabulary: GrammarVocabulary, walk: Walk) -> None:
    rare = "\U00010348"
    assert len(vocabulary.tokenizer.encode(rare)) > 1
    assert walk(compile_structure(StructuredOutput.choice([rare]), vocabulary), rare) == ""


def test_a_token_that_is_not_allowed_is_refused(vocabulary: GrammarVocabulary) -> None:
    constraint = compile_structure(StructuredOutput.json_object(), vocabulary)
    with pytest.raises(StructureError, match="JSON object") as caught:
        constraint.accept(vocabulary.tokenizer.encode("x")[0])
    assert "\n" not in str(caught.value)
    with pytest.raises(StructureError):
        constraint.mask()


def test_a_model_without_stop_tokens_ends_with_the_form(demo_bundle: Any, allowed: Allowed) -> None:
    opened = TextTokenizer.open(demo_bundle)
    tokenizer = TextTokenizer(opened._native, frozenset(), {})
    vocabulary = GrammarVocabulary(tokenizer, tokenizer.vocab_size + 32)
    constraint = compile_structure(StructuredOutput.regex("a|ab"), vocabulary)
    constraint.accept(tokenizer.encode("a")[0])
    assert allowed(constraint) == {tokenizer.encode("b")[0]}
    constraint.accept(tokenizer.encode("b")[0])
    assert constraint.is_done


def test_a_tokenizer_larger_than_the_model_is_refused(demo_bundle: Any) -> None:
    tokenizer = TextTokenizer.open(demo_bundle)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        GrammarVocabulary(tokenizer, tokenizer.vocab_size - 1)


def test_eight_threads_share_a_vocabulary(vocabulary: GrammarVocabulary, random_schemas: ModuleType) -> None:
    schemas = [random_schemas.random_schema(seed) for seed in range(24)]

    def masks(schema: Any) -> list[bytes]:
        rng = np.random.default_rng(len(json.dumps(schema)))
        constraint, seen = compile_structure(StructuredOutput.json_schema(schema), vocabulary), []
        while not constraint.is_done and len(seen) < 40:
            seen.append(constraint.mask().tobytes())
            ids = np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little"))
            token_id = int(rng.choice(ids))
            if token_id in EOS:
                break
            constraint.accept(token_id)
        return seen

    alone = [masks(schema) for schema in schemas]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(masks, schemas)) == alone
    assert sum(map(len, alone)) > 200
