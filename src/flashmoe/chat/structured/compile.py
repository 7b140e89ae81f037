"""From the form of an answer to a constraint that the engine can ask for masks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from flashmoe.chat.structured.after import AfterText, marker_masks
from flashmoe.chat.structured.constraint import GrammarConstraint
from flashmoe.chat.structured.schema_check import check_schema
from flashmoe.chat.structured.spec import StructuredOutput
from flashmoe.chat.structured.vocabulary import GrammarVocabulary
from flashmoe.errors import StructureError

_NAMES = {
    "json_object": "JSON object",
    "json_schema": "JSON Schema",
    "regex": "regular expression",
    "lark": "grammar",
    "choice": "choice",
}
# A schema cannot loosen these through its own "x-guidance".  JSON comes on one line, with at most one blank behind a
# comma or colon: with blanks and line breaks everywhere a small model goes on with them forever, and pretty-printed
# answers need about twice the tokens.
_JSON_OPTIONS = {
    "lenient": False,
    "coerce_one_of": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "json_allow_general_unicode_escapes": False,
}
# 5,000 optional properties are 110 kB and compile in 3 s, which grows with their square.
_MOST_TEXT = 1 << 20
# What a hostile grammar can take: 20,000 states are 3 MiB (ordinary schemas need hundreds); with this fuel
# "(a{1000}){1000}" takes 0.15 s where the library's 1,000,000 gives it 1.5 s and 150 MiB, and 10,000 words still fit.
_LIMITS = {"max_lexer_states": 20_000, "initial_lexer_fuel": 200_000, "verbose_errors": False}


def compile_structure(
    spec: StructuredOutput, vocabulary: GrammarVocabulary, stop_ids: Iterable[int] = ()
) -> GrammarConstraint | AfterText:
    """A fresh constraint for one answer, its first mask computed.

    stop_ids: tokens that end this answer besides the model's own.  Thread-safe: several may compile with one
    vocabulary at once, outside the interpreter's lock.  Raises StructureError (one line) when the schema, pattern or
    grammar is invalid, uses what is not supported, allows no text at all or is too large.
    """
    guidance = vocabulary.guidance
    grammar = _grammar(spec, guidance.LLMatcher)
    matcher = guidance.LLMatcher(
        vocabulary.trie, grammar, log_level=0, limits=guidance.LLParserLimits(**_LIMITS)
    )
    if matcher.is_error():
        raise StructureError(_refusal(spec, matcher.get_error()))
    stop_ids = tuple(stop_ids)
    constraint = GrammarConstraint(matcher, vocabulary, stop_ids, _NAMES[spec.kind])
    if spec.after is None:
        return constraint
    return AfterText(marker_masks(spec.after, vocabulary), constraint, vocabulary, stop_ids)


def _grammar(spec: StructuredOutput, matcher: Any) -> str:
    """The library's own description of a grammar; nothing is checked by it yet."""
    if spec.kind == "choice":
        return str(
            matcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(_literal, spec.payload)))
        )
    if spec.kind in ("json_object", "json_schema"):
        schema = {"type": "object"} if spec.kind == "json_object" else spec.payload
        return _json_grammar(schema, matcher)
    if not isinstance(spec.payload, str):
        raise StructureError(f"the {_NAMES[spec.kind]} must be a text, got {type(spec.payload).__name__}")
    _check_size(spec.payload, spec.kind)
    make = matcher.grammar_from_regex if spec.kind == "regex" else matcher.grammar_from_lark
    return str(make(spec.payload))


def _json_grammar(schema: Any, matcher: Any) -> str:
    if not isinstance(schema, dict | bool):
        raise StructureError(f"the JSON Schema must be an object or a boolean, got {type(schema).__name__}")
    if schema is False:
        raise StructureError("the JSON Schema false allows no text at all: correct it")
    try:
        text = json.dumps(schema, allow_nan=False)  # first: it finds values within themselves
        _check_size(text, "json_schema")
        check_schema(schema)
        text = "{}" if schema is True else text  # the library wants an object
        return str(matcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS))
    except (TypeError, ValueError, RecursionError) as error:
        raise StructureError(
            f"the JSON Schema is no JSON value ({_one_line(str(error))}): correct it"
        ) from error


def _check_size(text: str, kind: str) -> None:
    if len(text) > _MOST_TEXT:
        raise StructureError(
            f"the {_NAMES[kind]} has {len(text)} characters, at most {_MOST_TEXT} are taken: simplify it"
        )


def _literal(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StructureError(f"the choice {text!a} is no valid text: give it in UTF-8") from error
    return json.dumps(text, ensure_ascii=False)


def _refusal(spec: StructuredOutput, message: str) -> str:
    return f"the {_NAMES[spec.kind]} cannot be used: {_one_line(message)}: correct or simplify it"


def _one_line(message: str) -> str:
    """The library's message without its drawings of where in a pattern it stopped."""
    lines = [line.strip() for line in message.splitlines() if line.strip() and set(line.strip()) != {"^"}]
    return " ".join(line for line in lines if line != "<non-verbose/>")[:300]
