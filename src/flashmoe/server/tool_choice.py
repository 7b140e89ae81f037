"""Which tools a request offers to the model, and whether it must call one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flashmoe.errors import RequestError

Tools = Sequence[Mapping[str, Any]]


def choose_tools(tools: Tools | None, choice: str | Mapping[str, Any] | None) -> tuple[Tools | None, bool]:
    """(the tools that the prompt shows, whether one must be called).  Raises RequestError."""
    names = [_name(tool, number) for number, tool in enumerate(tools or ())]
    if isinstance(choice, Mapping):
        wanted = (choice.get("function") or {}).get("name") or choice.get("name")
        if wanted not in names:
            raise RequestError(f"tool_choice names {wanted!r}, which is not among the tools", "tool_choice")
        return [tool for tool, name in zip(tools or (), names, strict=True) if name == wanted], True
    if choice not in (None, "none", "auto", "required"):
        raise RequestError(f"tool_choice {choice!r} is unknown: use none, auto or required", "tool_choice")
    if choice == "required" and not names:
        raise RequestError("tool_choice is required, but there are no tools: give some", "tool_choice")
    return (None if choice == "none" or not names else tools), choice == "required"


def _name(tool: Mapping[str, Any], number: int) -> str:
    function = tool.get("function", tool)
    kind = tool.get("type", "function")
    if kind != "function":
        raise RequestError(f"tools[{number}] is of type {kind!r}: only functions are supported", "tools")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise RequestError(f"tools[{number}] has no function name", "tools")
    return name
