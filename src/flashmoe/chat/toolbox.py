"""Tools that a model may call: where they come from, several sources as one, and results of bounded length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from flashmoe.errors import ToolError


class Toolbox(Protocol):
    """A source of tools."""

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """Their definitions, in OpenAI's form."""

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The result of one of them, as text for the model.  Raises ToolError, which is for the model too."""


class Toolboxes:
    """Several sources as one; no result is longer than `most` characters."""

    def __init__(self, boxes: Sequence[Toolbox], most: int) -> None:
        """Raises ToolError when two tools have the same name."""
        self._owners: dict[str, Toolbox] = {}
        self.tools: list[Mapping[str, Any]] = []
        self._most = most
        for box in boxes:
            for tool in box.tools:
                name = tool["function"]["name"]
                if name in self._owners:
                    raise ToolError(f"two tools are called {name!r}: leave one of them out")
                self._owners[name] = box
                self.tools.append(tool)

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """See Toolbox."""
        if name not in self._owners:
            known = ", ".join(self._owners) or "none"
            raise ToolError(f"there is no tool {name!r}; there are: {known}")
        try:
            return cut(self._owners[name].call(name, arguments), self._most)
        except ToolError as error:
            raise ToolError(cut(error.text, self._most)) from error


def cut(text: str, most: int) -> str:
    """At most about so many characters: of a longer text, its beginning and its end."""
    if len(text) <= most:
        return text
    head, tail = most - most // 2, most // 2
    return f"{text[:head]}\n[... {len(text) - most} characters left out ...]\n{text[len(text) - tail :]}"
