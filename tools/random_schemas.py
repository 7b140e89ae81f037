"""Random JSON Schemas of every supported kind, the same for a seed; sizes are bounded so that answers stay short."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
_KEYS = ("id", "name", "größe", "名前", "a b", "tags", 'quo"te', "x-y", "emoji😀", "data", "n", "back\\slash")
_WORDS = ("red", "green", "Blau", "été", "日本", "a\nb", "tab\there", "", "null", "😀", "</think>", '"')
_PATTERNS = (
    r"^[a-z]{2,6}$",
    r"^\d{3}-\d{2}$",
    r"^(foo|bar)+[0-9]?$",
    r"^[A-Z][a-z]*( [A-Z][a-z]*){0,2}$",
    r"^#[0-9a-fA-F]{6}$",
    r"^[^\s@]{1,8}@[a-z]{1,6}\.(com|org)$",
)
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "duration")
_DEPTH = 2


def random_schema(seed: int) -> Schema:
    """A schema whose root is an object, an array or a reference to one."""
    rng = random.Random(seed)
    defs = {"small": _leaf(rng), "node": _node(rng)} if rng.random() < 0.4 else {}
    root = rng.choice((_object, _object, _array))(rng, _DEPTH, defs)
    if defs and rng.random() < 0.2:
        root = {"$ref": "#/$defs/node"}
    return root | ({"$defs": defs} if defs else {})


def _any(rng: random.Random, depth: int, defs: Schema) -> Schema:
    """A value of any kind; at depth 0 one without values inside it."""
    roll = rng.random()
    if defs and roll < 0.15:
        return {"$ref": f"#/$defs/{rng.choice(sorted(defs))}"}
    if depth == 0 or roll < 0.55:
        return _leaf(rng)
    compound: Callable[[random.Random, int, Schema], Schema] = rng.choice((_object, _array, _union))
    return compound(rng, depth - 1, defs)


def _leaf(rng: random.Random) -> Schema:
    schema = rng.choice((_integer, _number, _string, _string, _formatted, _literal, _plain))(rng)
    if "type" in schema and schema["type"] != "null" and rng.random() < 0.15:
        schema["type"] = [schema["type"], "null"]
    return schema


def _plain(rng: random.Random) -> Schema:
    return {"type": rng.choice(("boolean", "null"))}


def _integer(rng: random.Random) -> Schema:
    low = rng.randint(-1000, 1000)
    schema: Schema = {"type": "integer", "minimum": low, "maximum": low + rng.choice((0, 1, 9, 100, 12345))}
    if rng.random() < 0.3:
        schema["exclusiveMaximum"] = schema.pop("maximum") + 1
    if rng.random() < 0.2:
        schema |= {"minimum": 0, "multipleOf": rng.choice((2, 5, 10))}
        schema.pop("exclusiveMaximum", None)
        schema["maximum"] = 500
    return schema


def _number(rng: random.Random) -> Schema:
    low = round(rng.uniform(-50, 50), 2)
    return {
        "type": "number",
        rng.choice(("minimum", "exclusiveMinimum")): low,
        "maximum": low + rng.choice((1, 7.5)),
    }


def _string(rng: random.Random) -> Schema:
    if rng.random() < 0.4:
        return {"type": "string", "pattern": rng.choice(_PATTERNS), "maxLength": 20}
    low = rng.randint(0, 4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 12)}


def _formatted(rng: random.Random) -> Schema:
    return {"type": "string", "format": rng.choice(_FORMATS), "maxLength": 60}


def _literal(rng: random.Random) -> Schema:
    values: list[Any] = [*_WORDS, 0, -7, 3.5, True, None, [1, "x"], {"k": "v"}]
    if rng.random() < 0.3:
        return {"const": rng.choice(values)}
    return {"enum": rng.sample(values, rng.randint(1, 5))}


def _object(rng: random.Random, depth: int, defs: Schema) -> Schema:
    keys = rng.sample(_KEYS, rng.randint(0, 4))
    schema: Schema = {"type": "object", "properties": {key: _any(rng, depth, defs) for key in keys}}
    required = [key for key in keys if rng.random() < 0.6]
    if required:
        schema["required"] = required
    if len(required) == len(keys) and rng.random() < 0.25:
        extra = {"patternProperties": {"^k[0-9]{1,2}$": _leaf(rng)}, "maxProperties": len(keys) + 2}
        return schema | extra | {"additionalProperties": False}
    return schema | {"additionalProperties": False}


def _array(rng: random.Random, depth: int, defs: Schema) -> Schema:
    low = rng.randint(0, 2)
    schema: Schema = {"type": "array", "items": _any(rng, depth, defs), "maxItems": low + rng.randint(0, 2)}
    if low:
        schema["minItems"] = low
    if rng.random() < 0.2:
        schema["prefixItems"] = [_leaf(rng) for _ in range(rng.randint(1, 2))]
        schema["maxItems"] = max(schema["maxItems"], len(schema["prefixItems"]))
    return schema


def _union(rng: random.Random, depth: int, defs: Schema) -> Schema:
    return {"anyOf": [_any(rng, depth, defs) for _ in range(rng.randint(2, 3))]}


def _node(rng: random.Random) -> Schema:
    """A list of lists, which may become deep but rather does not."""
    children = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}
    properties = {"value": _integer(rng), "children": children}
    return {"type": "object", "properties": properties, "required": ["value"], "additionalProperties": False}
