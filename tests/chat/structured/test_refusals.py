"""What cannot be enforced is refused before a token is generated, in one line that says what and where."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest

from flashmoe.chat.structured import GrammarVocabulary, StructuredOutput, compile_structure
from flashmoe.engine.tokenizer import TextTokenizer
from flashmoe.errors import StructureError


def refusal(spec: StructuredOutput, vocabulary: GrammarVocabulary) -> str:
    with pytest.raises(StructureError) as caught:
        compile_structure(spec, vocabulary)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 450
    return message


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems at #,"),
        ({"properties": {"a": {"type": "array", "contains": {}}}}, "contains at #/properties/a"),
        ({"anyOf": [{}, {"not": {"type": "null"}}]}, "not at #/anyOf/1"),
        ({"if": {}, "then": {}}, "if at #"),
        ({"$defs": {"d": {"propertyNames": {}}}}, "propertyNames at #/$defs/d"),
        ({"items": {"dependentRequired": {"a": ["b"]}}}, "dependentRequired at #/items"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"minProperties": 2, "additionalProperties": {"type": "null"}}, "minProperties 2 at #"),
        ({"type": "integer", "minimum": 1, "exclusiveMinimum": True}, "exclusiveMinimum"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "strnig"}, "strnig"),
        ({"type": "string", "format": "uri-template"}, "uri-template"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/$defs/none"}, "/$defs/none"),
        ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
        ({"required": "a", "type": "object"}, "required"),
        ({"properties": 3}, "properties"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a'"),
        ({"enum": []}, "anyOf is empty"),
        (False, "allows no text"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "allows no text"),
        ({"const": float("nan")}, "no JSON value"),
        ({"const": {1, 2}}, "no JSON value"),
        ([1], "object or a boolean"),
    ],
)
def test_schemas(schema: Any, words: str, vocabulary: GrammarVocabulary) -> None:
    message = refusal(StructuredOutput.json_schema(schema), vocabulary)
    assert "JSON Schema" in message
    assert words in message


def test_keywords_are_no_names_of_properties(vocabulary: GrammarVocabulary) -> None:
    names = {"type": "object", "properties": {"not": {"type": "null"}, "uniqueItems": {"enum": [{"if": 1}]}}}
    compile_structure(StructuredOutput.json_schema(names), vocabulary)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (StructuredOutput.regex("a{2"), "regular expression"),
        (StructuredOutput.regex(r"(a)\1"), "backreferences"),
        (StructuredOutput.regex("[^\\x00-\\U0010FFFF]"), "regular expression"),
        (StructuredOutput("regex", 3), "must be a text, got int"),
        (StructuredOutput.lark("start: nothing"), 'unknown name: "nothing"'),
        (StructuredOutput.lark("begin: /a/"), "start"),
        (StructuredOutput.lark("start: start"), "allows no text"),
        (StructuredOutput.choice(["\ud800"]), "no valid text"),
    ],
)
def test_other_forms(spec: StructuredOutput, words: str, vocabulary: GrammarVocabulary) -> None:
    assert words in refusal(spec, vocabulary)


@pytest.mark.parametrize("options", [[], [""], "red", ["a", 3]])
def test_choices_are_texts(options: Any) -> None:
    with pytest.raises(StructureError, match="choice needs a list"):
        StructuredOutput.choice(options)


@pytest.mark.parametrize("after", ["", "x" * 65])
def test_markers_are_short(after: str) -> None:
    with pytest.raises(StructureError, match="</think>"):
        StructuredOutput.json_object().begin_after(after)


def test_a_missing_package_names_the_extra(demo_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(StructureError, match=r"flashmoe\[structured\]"):
        GrammarVocabulary(TextTokenizer.open(demo_bundle), 1 << 17)


def nesting(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def circle() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    return schema


def product(factors: int, terms: int) -> dict[str, Any]:
    return {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"p{i}": {"const": j}}} for j in range(terms)]}
            for i in range(factors)
        ]
    }


BOMBS = {
    "200 levels": nesting(200),
    "100,000 levels": nesting(100_000),
    "a value within itself": circle(),
    "a product of 4^12 terms": product(12, 4),
    "20,000 optional properties": {"properties": {f"p{i}": {"type": "null"} for i in range(20_000)}},
    "words of 2 MB": {"enum": [f"{i:07d}" for i in range(200_000)]},
    "a huge multiple": {"type": "integer", "multipleOf": 999_999_937},
}


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_schemas_are_refused(name: str, vocabulary: GrammarVocabulary) -> None:
    refusal(StructuredOutput.json_schema(BOMBS[name]), vocabulary)


def test_a_pattern_of_a_million_letters_costs_nothing_before_they_come(vocabulary: GrammarVocabulary) -> None:
    constraint = compile_structure(StructuredOutput.regex("(a{1000}){1000}"), vocabulary)
    assert constraint.mask().any()


def test_a_grammar_that_grows_too_complex_ends_the_answer_with_an_error(
    vocabulary: GrammarVocabulary,
) -> None:
    constraint = compile_structure(StructuredOutput.regex("(a|b)*a(a|b){20}"), vocabulary)
    letters = [vocabulary.tokenizer.encode(letter)[0] for letter in "ab"]
    rng = random.Random(1)

    def go_on() -> None:
        for _ in range(20_000):
            constraint.mask()
            constraint.accept(rng.choice(letters))

    with pytest.raises(StructureError, match="too many states") as caught:
        go_on()
    assert "\n" not in str(caught.value)
