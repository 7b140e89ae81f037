"""JSON Schemas that the grammar compiler would take but not keep to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flashmoe.errors import StructureError

_IN_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_IN_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
_SINGLE = (
    "items",
    "additionalProperties",
    "additionalItems",
    "not",
    "contains",
    "propertyNames",
    "if",
    "then",
    "else",
)
# Keywords of Draft 3 to 2020-12 that limit a value and that the compiler refuses or, worse, leaves out.
_UNSUPPORTED = (
    *("uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems"),
    *("propertyNames", "unevaluatedProperties", "dependencies", "dependentRequired", "dependentSchemas"),
    *("not", "if", "then", "else", "$dynamicRef", "$recursiveRef", "extends", "disallow", "divisibleBy"),
)


def check_schema(schema: Any) -> None:
    """Raises StructureError, one line that names keyword and place, for what masks could not enforce."""
    for place, part in _parts(schema):
        for keyword in _UNSUPPORTED:
            if keyword in part:
                raise StructureError(
                    f"the JSON Schema uses {keyword} at {place}, which structured output cannot enforce: remove it"
                )
        _check_limits(place, part)


def _check_limits(place: str, part: dict[str, Any]) -> None:
    # Keys beyond those listed may come twice, and count once.
    least, required = part.get("minProperties"), part.get("required", ())
    if isinstance(least, int) and isinstance(required, list | tuple) and least - len(required) > 1:
        raise StructureError(
            f"the JSON Schema uses minProperties {least} at {place} with fewer required properties, which structured "
            "output cannot enforce: list at least all but one in required"
        )
    for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(part.get(keyword), bool):
            raise StructureError(
                f"the JSON Schema uses the boolean {keyword} of Draft 4 at {place}: give the bound itself as {keyword}"
            )


def _parts(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of the schema that is itself a schema, with its JSON pointer; no recursion, whatever the depth."""
    waiting = [("#", schema)]
    while waiting:
        place, part = waiting.pop()
        if not isinstance(part, dict):
            continue
        yield place, part
        for keyword in _IN_MAPS:
            if isinstance(part.get(keyword), dict):
                waiting += [(f"{place}/{keyword}/{name}", value) for name, value in part[keyword].items()]
        for keyword in _IN_LISTS:
            if isinstance(part.get(keyword), list | tuple):
                waiting += [(f"{place}/{keyword}/{i}", value) for i, value in enumerate(part[keyword])]
        waiting += [(f"{place}/{keyword}", part[keyword]) for keyword in _SINGLE if keyword in part]
