"""Calls written as JSON: {"name": ..., "arguments": {...}}, and arguments alone."""

from __future__ import annotations

import json
from dataclasses import dataclass

from flashmoe.chat.dialects.json_scan import Malformed
from flashmoe.chat.dialects.parsing import CallDraft
from flashmoe.chat.dialects.schema import json_object
from flashmoe.chat.dialects.source import Source, Step

# The second one is what models trained on Llama's format write.
_ARGUMENTS = ("arguments", "parameters")


@dataclass
class _Members:
    """What is known of the object so far."""

    name: str | None = None
    call_id: str | None = None
    arguments: str | None = None
    started: bool = False


def read_call(source: Source, draft: CallDraft) -> Step[None]:
    """Read one object with a name and arguments into the draft; draft.end() is left to the caller.

    Members may stand in any order, others are passed over; missing arguments are none, and arguments that are a string
    with JSON in it count as that JSON.  Raises Malformed.
    """
    members = _Members()
    yield from source.expect("{")
    separator = ","
    while separator == ",":
        yield from source.spaces()
        if (yield from source.starts('"')) is None:
            raise Malformed
        key = json.loads((yield from source.json()))
        yield from source.spaces()
        yield from source.expect(":")
        yield from source.spaces()
        yield from _member(source, draft, key, members)
        yield from source.spaces()
        separator = yield from source.expect(",", "}")
    if members.name is None:
        raise Malformed
    if not members.started:
        draft.start(members.name, members.call_id)
        draft.arguments(members.arguments or "{}")


def read_arguments(source: Source, draft: CallDraft) -> Step[None]:
    """Read an object into the draft of a call that has been started.  Raises Malformed."""
    yield from source.spaces()
    if (yield from source.starts("{")) is None:
        raise Malformed
    yield from source.json(draft.arguments)


def _member(source: Source, draft: CallDraft, key: str, members: _Members) -> Step[None]:
    if key in _ARGUMENTS:
        if members.arguments is not None:
            raise Malformed
        object_next = (yield from source.starts("{")) is not None
        if object_next and members.name is not None and draft.streams(members.name):
            members.started = True
            draft.start(members.name, members.call_id)
            members.arguments = yield from source.json(draft.arguments)
        else:
            members.arguments = _arguments((yield from source.json()))
        return
    value = json.loads((yield from source.json()))
    if key == "name":
        if not isinstance(value, str) or not value or members.name is not None:
            raise Malformed
        members.name = value
    elif key == "id" and isinstance(value, str):
        members.call_id = value


def _arguments(text: str) -> str:
    """The JSON object that a value stands for."""
    value = json.loads(text)
    if value is None:
        return "{}"
    found = text if isinstance(value, dict) else json_object(value) if isinstance(value, str) else None
    if found is None:
        raise Malformed
    return found
