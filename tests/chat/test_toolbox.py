"""Several sources of tools as one."""

from __future__ import annotations

from typing import Any

import pytest

from flashmoe.chat.toolbox import Toolboxes, cut
from flashmoe.errors import ToolError


class Echo:
    """A toolbox whose tools say what they were given."""

    def __init__(self, *names: str) -> None:
        self.tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in names]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        if arguments.get("fail"):
            raise ToolError("no\n" * 1000)
        return f"{name} {arguments}"


def test_calls_find_their_source() -> None:
    boxes = Toolboxes([Echo("a"), Echo("b", "c")], most=100)
    assert [tool["function"]["name"] for tool in boxes.tools] == ["a", "b", "c"]
    assert boxes.call("c", {"x": 1}) == "c {'x': 1}"
    with pytest.raises(ToolError, match="there is no tool 'd'; there are: a, b, c"):
        boxes.call("d", {})


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ToolError, match="two tools are called 'a'"):
        Toolboxes([Echo("a"), Echo("a")], most=100)


def test_long_results_and_errors_keep_both_ends() -> None:
    boxes = Toolboxes([Echo("a")], most=100)
    text = boxes.call("a", {"x": "1234567890" * 50})
    assert text.startswith("a {'x': '1234567890")
    assert text.endswith("1234567890'}")
    assert "characters left out" in text
    assert len(text) < 150
    with pytest.raises(ToolError) as error:
        boxes.call("a", {"fail": True})
    assert len(error.value.text) < 150
    assert "\n" in error.value.text  # the model sees lines, the user one of them


def test_what_is_cut_adds_up() -> None:
    for most in (0, 1, 2, 7, 50):
        text = "".join(map(str, range(100)))
        shown = cut(text, most)
        head, note, tail = shown.split("\n")
        assert text.startswith(head)
        assert text.endswith(tail)
        assert len(head) + len(tail) == most
        assert f" {len(text) - most} characters" in note
    assert cut("short", 5) == "short"
