"""The demo model, made to answer by JSON Schemas: every answer is valid."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

Valid = Callable[[Any, int], Any]
_TREE = {
    "type": "object",
    "properties": {"v": {"enum": [1, 2]}, "l": {"$ref": "#/$defs/tree"}, "r": {"$ref": "#/$defs/tree"}},
    "required": ["v"],
    "additionalProperties": False,
}
_LISP = {"anyOf": [{"enum": ["+", "x"]}, {"type": "array", "items": {"$ref": "#/$defs/lisp"}, "maxItems": 2}]}


def closed(**properties: Any) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def nested(depth: int, inner: dict[str, Any]) -> dict[str, Any]:
    """Objects and arrays in turn around a schema."""
    for level in range(depth):
        inner = (
            closed(d=inner) if level % 2 else {"type": "array", "items": inner, "minItems": 1, "maxItems": 1}
        )
    return inner


HARD = {
    "binary tree": {"$ref": "#/$defs/tree", "$defs": {"tree": _TREE}},
    "recursion through anyOf": {"$ref": "#/$defs/lisp", "$defs": {"lisp": _LISP}},
    "recursion to the root": closed(next={"anyOf": [{"type": "null"}, {"$ref": "#"}]}),
    "two definitions that need each other": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": {"type": "array", "items": {"$ref": "#/$defs/b"}, "maxItems": 1},
            "b": closed(a={"$ref": "#/$defs/a"}),
        },
    },
    "40 levels": nested(40, {"type": "integer", "minimum": 0, "maximum": 9}),
    "unicode keys": closed(
        **{"größe": {"type": "null"}, "名前": {"type": "boolean"}, "😀": {"const": "👩‍👩‍👧"}}
    ),
    "keys to be escaped": closed(**{key: {"type": "null"} for key in ('"', "\\", "\n\t", "", "\x01", "/")}),
    "names of pointers": {"$ref": "#/$defs/a~1b~0c", "$defs": {"a/b~c": {"enum": ["/", "~"]}}},
    "unicode enum": {"enum": ["é", "e\u0301", "日本語", "\u0000", "\u2028", "\ufeff", "😀", "\x7f"]},
    "empty object": {"type": "object", "additionalProperties": False},
    "empty array": {"type": "array", "maxItems": 0},
    "2,000 words": {"enum": [f"word {i} {'é' * (i % 7)}" for i in range(2000)]},
    "500 numbers and objects": {"enum": [*range(0, 4000, 10), *({"k": i} for i in range(100))]},
    "100 optional properties": {
        "type": "object",
        "properties": {f"p{i}": {"type": "boolean"} for i in range(100)},
        "additionalProperties": False,
    },
    "60 required properties": closed(**{f"key_{i}": {"type": "null"} for i in range(60)}),
    "long pattern": {
        "type": "string",
        "pattern": "^" + "".join(f"[a-{chr(98 + i % 25)}]" for i in range(150)) + "$",
    },
    "alternatives in a pattern": {
        "type": "string",
        "pattern": "^(" + "|".join(f"w{i}x{i * i}" for i in range(400)) + ")$",
    },
    "pattern without anchors": {"type": "string", "pattern": "a+b", "maxLength": 12},
    "pattern of letters": {"type": "string", "pattern": "^[\u0411-\u042f][\u0431-\u0451]{1,8}$"},
    "exact length": {"type": "string", "minLength": 17, "maxLength": 17},
    "one code point": {"type": "string", "minLength": 1, "maxLength": 1},
    "narrow range": {"type": "number", "minimum": 0.125, "maximum": 0.125},
    "negative range": {"type": "integer", "exclusiveMinimum": -1001, "exclusiveMaximum": -998},
    "large integers": {"type": "integer", "minimum": 10**15, "maximum": 10**15 + 10**9},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 10_000},
    "overlapping anyOf": {"anyOf": [closed(a={"enum": [1]}), closed(a={"enum": [1, 2]}, b={"type": "null"})]},
    "disjoint oneOf": {"oneOf": [closed(t={"const": "a"}), closed(t={"const": "b"}, n={"enum": [1, 2]})]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 9}, {"multipleOf": 4}]},
    "tuple": {
        "type": "array",
        "prefixItems": [{"const": 1}, {"type": "boolean"}],
        "items": {"enum": ["x"]},
        "minItems": 2,
        "maxItems": 5,
    },
    "closed tuple": {
        "type": "array",
        "prefixItems": [{"const": 1}, {"const": 2}],
        "items": False,
        "minItems": 2,
    },
    "map": {
        "type": "object",
        "patternProperties": {"^[a-z]{1,4}$": {"enum": [0, 1]}},
        "additionalProperties": False,
        "maxProperties": 4,
    },
    "required but not described": {
        "type": "object",
        "required": ["a"],
        "additionalProperties": {"enum": [1]},
        "maxProperties": 1,
    },
    "types in a list": {"type": ["null", "boolean", "array"], "items": {"type": "null"}, "maxItems": 3},
    "formats": closed(
        **{
            f: {"type": "string", "format": f, "maxLength": 45}
            for f in ("date", "time", "date-time", "uuid", "ipv4")
        }
    ),
    "annotations": {
        "title": "T",
        "description": "D",
        "default": 3,
        "examples": [1],
        "x-own": {},
        "enum": ["only"],
    },
    "Draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"n": {"type": "integer", "minimum": 1, "maximum": 3}},
        "type": "array",
        "items": [{"$ref": "#/definitions/n"}, {"type": "null"}],
        "additionalItems": False,
    },
}


@pytest.mark.parametrize("seed", range(40))
def test_random_schemas(seed: int, valid_answer: Valid, random_schemas: ModuleType) -> None:
    valid_answer(random_schemas.random_schema(seed), seed)


@pytest.mark.parametrize("name", HARD)
def test_hard_schemas(name: str, valid_answer: Valid) -> None:
    valid_answer(HARD[name], 1)


def test_a_schema_cannot_switch_its_own_enforcement_off(valid_answer: Valid) -> None:
    loose = {"lenient": True, "item_separator": "x", "key_separator": "=", "whitespace_flexible": True}
    assert set(valid_answer(closed(a={"const": 1}, b={"const": 2}) | {"x-guidance": loose}, 1)) == {"a", "b"}


def test_the_generator_covers_what_it_names(random_schemas: ModuleType) -> None:
    text = json.dumps([random_schemas.random_schema(seed) for seed in range(200)])
    wanted = (
        *(
            "enum",
            "const",
            "required",
            "properties",
            "items",
            "minItems",
            "maxItems",
            "prefixItems",
            "pattern",
        ),
        *(
            "minLength",
            "maxLength",
            "format",
            "minimum",
            "exclusiveMaximum",
            "multipleOf",
            "anyOf",
            "$ref",
            "$defs",
        ),
        *("patternProperties", "additionalProperties", "maxProperties"),
    )
    assert [keyword for keyword in wanted if f'"{keyword}":' not in text] == []
    assert random_schemas.random_schema(7) == random_schemas.random_schema(7)
