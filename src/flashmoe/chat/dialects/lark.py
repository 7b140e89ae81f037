"""Grammars in llguidance's variant of Lark, written rule by rule."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


class LarkGrammar:
    """Collects rules.  Markers that are special tokens appear by id, because no text ever produces such a token."""

    def __init__(self, token_ids: Mapping[str, int] | None = None) -> None:
        self._token_ids = dict(token_ids or {})
        self._rules: list[str] = []
        names = sorted(self._token_ids, key=len, reverse=True)
        self._markers = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    def rule(self, name: str, body: str, options: str = "") -> str:
        """Add a rule and return its name; ``options`` are llguidance's, like "lazy"."""
        self._rules.append(f"{name}[{options}]: {body}" if options else f"{name}: {body}")
        return name

    def json(self, name: str, schema: Mapping[str, Any]) -> str:
        """Add a rule for JSON of this schema and return its name."""
        return self.rule(name, "%json " + json.dumps(schema, ensure_ascii=False))

    def text(self, text: str) -> str:
        """The items that stand for exactly this text."""
        parts = self._markers.split(text) if self._markers else [text]
        return " ".join(self._item(part) for part in parts if part)

    def __str__(self) -> str:
        return "\n".join(self._rules) + "\n"

    def _item(self, part: str) -> str:
        token_id = self._token_ids.get(part)
        return json.dumps(part, ensure_ascii=False) if token_id is None else f"<[{token_id}]>"


def alternatives(names: list[str]) -> str:
    """One of the rules."""
    return "(" + " | ".join(names) + ")"


def call_object_rules(grammar: LarkGrammar, schemas: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rules for {"name": ..., "arguments": ...}, one for each function.

    Only the arguments are given as a schema, so that references into it stay right.
    """
    return [
        grammar.rule(
            f"call_{number}",
            " ".join(
                (
                    grammar.text(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '),
                    grammar.json(f"arguments_{number}", schema),
                    grammar.text("}"),
                )
            ),
        )
        for number, (name, schema) in enumerate(schemas.items())
    ]
