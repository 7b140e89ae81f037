"""Responses that later ones may continue, in memory and bounded; a restart forgets them."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

_MOST_NBYTES = 16 << 20  # of JSON; the objects take some five times as much, still 2 % of 4 GiB
_MOST_RESPONSES = 1024

Item = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A response; history: all items of its conversation, its own input and output at the end."""

    response: dict[str, Any]
    history: list[Item]
    own_input: list[Item]
    nbytes: int


class ResponseStore:
    """Keeps the most recently used responses.  Belongs to the event loop's thread."""

    def __init__(self, most_nbytes: int = _MOST_NBYTES, most_responses: int = _MOST_RESPONSES) -> None:
        self._most_nbytes, self._most_responses = most_nbytes, most_responses
        self._held: OrderedDict[str, Stored] = OrderedDict()  # least recently used first
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def put(self, response: dict[str, Any], before: list[Item], own_input: list[Item]) -> None:
        """Keep a finished response, `before` being its conversation before its own input, if it is not too large.

        Each response counts with its whole conversation, though the items are shared: what is dropped is then
        certainly given back, whichever of a conversation's responses are left.
        """
        history = [*before, *own_input, *response["output"]]
        nbytes = len(json.dumps([response, history]))
        if nbytes > self._most_nbytes:
            return
        while self._held and (
            self._nbytes + nbytes > self._most_nbytes or len(self._held) >= self._most_responses
        ):
            self._nbytes -= self._held.popitem(last=False)[1].nbytes
        self._held[response["id"]] = Stored(response, history, own_input, nbytes)
        self._nbytes += nbytes

    def get(self, name: str) -> Stored | None:
        """The response of that id."""
        if name in self._held:
            self._held.move_to_end(name)
        return self._held.get(name)

    def item(self, name: str) -> Item | None:
        """The item of that id in any of them, the newest first."""
        for stored in reversed(self._held.values()):
            for item in reversed(stored.history):
                if item.get("id") == name:
                    return item
        return None

    def delete(self, name: str) -> bool:
        """Forget it; False when it was not known."""
        stored = self._held.pop(name, None)
        self._nbytes -= stored.nbytes if stored else 0
        return stored is not None
