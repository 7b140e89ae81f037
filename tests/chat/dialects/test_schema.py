"""Types of parameters out of JSON schemas, and what a text means by them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.chat.dialects.schema import json_from_text, parameter_types

ROOT = {
    "$defs": {
        "Size": {"enum": [1, 2.5, "L", None, True, [], {}]},
        "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "integer"}]},
        "a/b~c": {"type": "boolean"},
    }
}
ALL = {"integer", "number", "string", "null", "boolean", "array", "object"}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "integer"}, {"integer"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"type": "integer", "nullable": True}, {"integer", "null"}),
        ({"anyOf": [{"type": "array"}, {"oneOf": [{"type": "null"}]}]}, {"array", "null"}),
        ({"allOf": [{"$ref": "#/$defs/a~1b~0c"}]}, {"boolean"}),
        ({"$ref": "#/$defs/Size"}, ALL),
        ({"$ref": "#/$defs/Loop"}, {"integer"}),
        ({"$ref": "#/$defs/Nothing"}, set()),
        ({"$ref": "#"}, set()),
        ({"const": "x"}, {"string"}),
        ({"type": "string", "enum": [1]}, {"string"}),
        ({}, set()),
        ({"anyOf": 5, "type": 7, "enum": {}}, set()),
        (True, set()),
        (None, set()),
    ],
)
def test_types_of_a_schema(schema: object, types: set[str]) -> None:
    assert parameter_types(schema, ROOT) == types


@pytest.mark.parametrize(
    ("types", "text", "value"),
    [
        ({"string", "integer"}, "5", "5"),
        ({"string", "array"}, '["a"]', ["a"]),
        ({"string", "object"}, "[x", "[x"),
        ({"string", "null"}, "null", None),
        ({"string"}, '{"a": 1}', '{"a": 1}'),
        ({"integer", "boolean"}, "true", True),
        ({"integer", "null"}, "none", "none"),
        ({"number"}, "-0.5e-3", -0.0005),
        ({"number"}, "1.", "1."),
        ({"number"}, "NaN", "NaN"),
        ({"number"}, "inf", "inf"),
        ({"integer"}, "1.5", "1.5"),
        ({"integer"}, "007", "007"),
        ({"integer"}, "9" * 5000, "9" * 5000),
        ({"array"}, "(1, 2)", "(1, 2)"),
        ({"array"}, "[1, {2}]", "[1, {2}]"),
        ({"array"}, "[" * 9000, "[" * 9000),
        ({"object"}, "{'a': (1, 'b'), 'c': True}", {"a": [1, "b"], "c": True}),
        ({"object"}, "{'a': 1e999}", "{'a': 1e999}"),
        ({"object"}, '{"a": 1} x', '{"a": 1} x'),
        ({"null"}, "null", None),
        ({"null"}, "x", "x"),
        (set(), "5", "5"),
    ],
)
def test_what_a_text_means(types: set[str], text: str, value: object) -> None:
    found = json.loads(json_from_text(text, frozenset(types)))
    assert (found, type(found)) == (value, type(value))


@given(text=st.text(), types=st.sets(st.sampled_from(sorted(ALL))))
def test_every_text_means_something(text: str, types: set[str]) -> None:
    found = json.loads(json_from_text(text, frozenset(types)))
    if not types - {"string"}:
        assert found == text


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
)


@given(value=st.lists(values) | st.dictionaries(st.text(), values))
def test_python_and_json_spellings_mean_the_same(value: object) -> None:
    types = frozenset({"array", "object"})
    assert json.loads(json_from_text(json.dumps(value), types)) == value
    assert json.loads(json_from_text(repr(value), types)) == value
