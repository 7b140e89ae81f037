"""What a parameter written as plain text means, by the tool's JSON schema."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from flashmoe.chat.dialects.json_scan import JsonScanner, Malformed

Schema = Mapping[str, Any]

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")
# As deep as alternatives of alternatives are followed.
_DEEPEST = 16


def parameter_types(schema: object, root: Schema) -> frozenset[str]:
    """The JSON types that a schema permits, by their names in JSON schema; empty when it does not say.

    root: the schema of all parameters, into which "$ref" points.
    """
    return frozenset(_types(schema, root, set(), _DEEPEST))


def json_from_text(text: str, types: frozenset[str]) -> str:
    """The JSON text of a parameter whose value the model wrote as ``text``.

    A string stays a string, even one that looks like a number, wherever a string is permitted; only "null" and, where
    the schema permits them beside a string, objects and arrays are taken as such.  Python's None, True and literals
    count too, because templates write a conversation's values like that.  What cannot be read stays a string.
    """
    found = _not_a_string(text.strip(), types) if types - {"string"} else None
    return json.dumps(text, ensure_ascii=False) if found is None else found


def json_object(text: str) -> str | None:
    """The text if it is one JSON object, with control characters in its strings escaped; else None."""
    value = _json_value(text.strip())
    return value if value is not None and value.startswith("{") else None


def _types(schema: object, root: Schema, followed: set[str], depth: int) -> Iterator[str]:
    if not isinstance(schema, Mapping) or depth == 0:
        return
    if schema.get("nullable") is True:
        yield "null"
    yield from _named_types(schema)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in followed:
        followed.add(reference)
        yield from _types(_referred(reference, root), root, followed, depth - 1)
    for key in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, list) else ():
            yield from _types(part, root, followed, depth - 1)


def _named_types(schema: Schema) -> Iterator[str]:
    named = schema.get("type")
    if isinstance(named, str):
        yield named
    elif isinstance(named, list):
        yield from (name for name in named if isinstance(name, str))
    elif isinstance(schema.get("enum"), list):
        yield from map(_type_of, schema["enum"])
    elif "const" in schema:
        yield _type_of(schema["const"])


def _referred(reference: str, root: Schema) -> object:
    found: object = root
    for part in reference.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _type_of(value: object) -> str:
    names = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"))
    return next(
        (name for kind, name in names if isinstance(value, kind)), "null" if value is None else "object"
    )


def _not_a_string(text: str, types: frozenset[str]) -> str | None:
    if text in ("null", "None") and ("null" in types or "string" not in types):
        return "null"
    if "string" not in types:
        if "boolean" in types and text.lower() in ("true", "false"):
            return text.lower()
        number = _number(text, types)
        if number is not None:
            return number
    return _container(text) if types & {"object", "array"} else None


def _number(text: str, types: frozenset[str]) -> str | None:
    if types & {"integer", "number"} and _INTEGER.fullmatch(text):
        return _json_value(text)
    if "number" in types:
        return _json_value(text) if text[:1] in set("-0123456789") else None
    whole = _WHOLE.fullmatch(text) if "integer" in types else None
    return whole[1] if whole else None


def _container(text: str) -> str | None:
    if text[:1] not in ("{", "["):
        return None
    return _json_value(text) or _python_literal(text)


def _json_value(text: str) -> str | None:
    scanner = JsonScanner()
    try:
        scanner.scan(text + " ", 0)  # the space ends a number
    except Malformed:
        return None
    return scanner.taken() if scanner.done and scanner.position == len(text) else None


def _python_literal(text: str) -> str | None:
    try:
        written = json.dumps(ast.literal_eval(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return _json_value(written)
