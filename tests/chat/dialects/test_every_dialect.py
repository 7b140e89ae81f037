"""What holds for every dialect: cutting changes nothing, nothing is lost, calls come back as they were written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flashmoe.chat.dialects import PlainParser, TextDelta, ToolCallArguments, ToolCallStart
from flashmoe.chat.dialects.qwen_xml import QwenXml
from flashmoe.errors import PromptError

Calls = list[tuple[str, Any]]
Read = Callable[..., Any]


_JSON_BITS = (
    "{",
    "}",
    '"',
    ":",
    ",",
    "[",
    "{}",
    '{"city": "x"}',
    '"a\\"',
    "1",
    "\\u00",
    "null",
    "\n",
    " ",
    "a",
)

cuts = st.lists(st.integers(0, 10_000), max_size=30)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=6
)
arguments = st.fixed_dictionaries(
    {"city": st.text()},
    optional={
        "days": st.integers(),
        "share": st.floats(allow_nan=False, allow_infinity=False),
        "exact": st.booleans(),
        "tags": st.lists(values, max_size=3),
        "options": st.dictionaries(st.text(), values, max_size=3),
        "note": st.none() | st.text(min_size=5),
    },
)
call_lists = st.lists(st.tuples(st.just("weather"), arguments) | st.just(("now", {})), min_size=1, max_size=3)


def soup(form: Any) -> st.SearchStrategy[str]:
    """Markers, whole calls and JSON in any order: mostly malformed."""
    whole = form.write([("weather", {"city": "<tool_call>\n"})])
    bits = (*form.markers, whole, whole[: len(whole) // 2], "<think>", "</think>", *_JSON_BITS)
    return st.lists(st.sampled_from(bits) | st.text(max_size=3), max_size=14).map("".join)


@given(data=st.data())
def test_any_cutting_into_pieces_gives_the_same_answer(form: Any, read: Read, data: st.DataObject) -> None:
    text = data.draw(soup(form))
    for eager in (False, True):
        for reasoning_open in (False, True):
            whole = read(form.dialect, text, reasoning_open=reasoning_open, eager=eager)
            single = read(form.dialect, text, range(len(text)), reasoning_open=reasoning_open, eager=eager)
            pieces = read(form.dialect, text, data.draw(cuts), reasoning_open=reasoning_open, eager=eager)
            assert whole == single == pieces


@given(data=st.data())
def test_nothing_of_a_malformed_answer_is_lost(form: Any, read: Read, data: st.DataObject) -> None:
    text = "x" + data.draw(soup(form))  # so that it does not begin with reasoning
    for eager in (False, True):
        answer = read(form.dialect, text, data.draw(cuts), eager=eager)
        if not answer.calls and "<|message|>" not in text:
            assert answer.given_back == text


@given(calls=call_lists, cuts=cuts, eager=st.booleans())
def test_calls_come_back_as_they_were_written(
    form: Any, read: Read, calls: Calls, cuts: list[int], eager: bool
) -> None:
    answer = read(form.dialect, form.write(calls), cuts, eager=eager)
    assert answer.calls == calls
    assert (answer.text, answer.reasoning) == ("", "")
    assert answer.ids == [f"id{number}" for number in range(len(calls))]


@given(text=st.text(), cuts=cuts)
def test_text_without_markers_passes_unchanged(form: Any, read: Read, text: str, cuts: list[int]) -> None:
    assume(
        not any(
            opening in text for opening in ("think>", "THINK]", "<|", "<｜", "<tool", "<function", "[TOOL")
        )
    )
    assert read(form.dialect, text, cuts).text == text
    assert read(form.dialect, text, cuts, reasoning_open=True).reasoning == (
        text if form.dialect.name == "harmony" else text.lstrip("\n")
    )


def test_a_cut_call_is_text_wherever_it_is_cut(form: Any, read: Read) -> None:
    text = "Wait.\n\n" + form.write([("weather", {"city": "Zürich", "days": 3})])
    complete = 0
    for end in range(len("Wait."), len(text)):
        cut = read(form.dialect, text[:end])
        complete += bool(cut.calls)
        assert (cut.text.rstrip(), cut.calls) == ("Wait.", [("weather", {"city": "Zürich", "days": 3})]) or (
            cut.text == text[:end]
        )
        eager = read(form.dialect, text[:end], eager=True)
        assert eager.calls == cut.calls
        assert eager.calls or eager.given_back == text[:end]
    assert complete < 60  # only its closing markers may be missing


def test_text_stands_before_between_and_behind_calls(form: Any, read: Read) -> None:
    call = form.write([("now", {})])
    answer = read(form.dialect, f"One\n\n{call}\n Two {call}\n")
    assert answer.calls == [("now", {})] * 2
    # On channels white space is part of the messages.
    assert answer.text == ("One\n\n\n Two \n" if form.dialect.name == "harmony" else "One\n Two")


def test_eager_sends_arguments_while_they_come(form: Any, tools: list[Any]) -> None:
    text = form.write([("weather", {"city": "ß" * 40, "days": 3})])
    begun = text[: text.index("ß") + 20]
    parser = form.dialect.parser(tools, eager=True)
    early = [event for character in begun for event in parser.push(character)]
    assert any(isinstance(event, ToolCallStart) for event in early)
    assert "".join(e.json_delta for e in early if isinstance(e, ToolCallArguments)).count("ß") == 20
    parser = form.dialect.parser(tools)
    assert [event for character in begun for event in parser.push(character)] == []


def test_an_unknown_function_is_a_call_but_never_announced_early(
    form: Any, read: Read, tools: list[Any]
) -> None:
    text = form.write([("missing", {"city": "x"})])
    assert read(form.dialect, text).calls == [("missing", {"city": "x"})]
    parser = form.dialect.parser(tools, eager=True)
    head = text[: text.rindex("x")]
    assert not any(isinstance(event, ToolCallStart) for character in head for event in parser.push(character))
    assert read(form.dialect, text, eager=True).calls == [("missing", {"city": "x"})]


@pytest.mark.parametrize("tools", [None, []])
def test_without_tools_calls_are_text(form: Any, read: Read, tools: list[Any] | None) -> None:
    text = "See: " + form.write([("weather", {"city": "x"})])
    assert read(form.dialect, text, tools=tools).text == text


def test_text_comes_at_once_unless_it_may_begin_a_marker(form: Any, tools: list[Any]) -> None:
    parser = form.dialect.parser(tools)
    assert parser.push("Hello") == [TextDelta("Hello")]
    assert parser.push(" < or [ ") == [TextDelta(" < or [")]
    assert parser.push("x") == [TextDelta(" x")]
    assert parser.finish() == []
    with pytest.raises(ValueError, match="finished"):
        parser.push("more")


def test_a_broken_call_does_not_hide_the_next_one(form: Any, read: Read) -> None:
    good = form.write([("now", {})])
    broken = form.write([("weather", {"city": "x"})]).replace("{", "{,").replace("<parameter=", "<parametre=")
    answer = read(form.dialect, f"{broken}\n{good}")
    assert answer.calls == [("now", {})]
    assert answer.text.rstrip() == broken


def test_a_call_that_is_begun_again_and_again_is_read_once(form: Any, read: Read) -> None:
    whole = form.write([("weather", {"city": "x"})])
    text = whole[: whole.index("x")] * 3000  # quadratic reading would take minutes
    answer = read(form.dialect, text)
    assert answer.text == text


def test_a_tool_without_a_name_is_refused() -> None:
    with pytest.raises(PromptError, match=r"tools\[1\] has no function name"):
        QwenXml().parser([{"name": "a"}, {"type": "function", "function": {}}])


@pytest.mark.parametrize("name", ["qwen_xml", "hermes_json", "deepseek"])
@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nhm\n</think>\n\nHi\n", "hm", "Hi\n"),
        ("\n<think>\n\n</think>\n\nHi", "", "Hi"),
        ("<think>hm", "hm", ""),
        ("<think>a</thin b</think>c", "a</thin b", "c"),
        ("say <think>x</think>", "", "say <think>x</think>"),
        ("<thinking>x", "", "<thinking>x"),
        ("</think>x", "", "</think>x"),
    ],
)
def test_reasoning_is_split_at_the_beginning(
    read: Read, forms: Any, name: str, text: str, reasoning: str, content: str
) -> None:
    answer = read(forms[name].dialect, text, range(len(text)))
    assert (answer.reasoning, answer.text) == (reasoning, content)


@pytest.mark.parametrize("name", ["qwen_xml", "hermes_json", "deepseek", "mistral"])
def test_reasoning_that_the_prompt_opened(read: Read, forms: Any, name: str) -> None:
    dialect = forms[name].dialect
    opening, closing = ("[THINK]", "[/THINK]") if name == "mistral" else ("<think>", "</think>")
    assert dialect.opens_reasoning(f"...{opening}\n")
    assert not dialect.opens_reasoning(f"...{opening}\n\n{closing}\n\n")
    for begun in ("", "\n", f"{opening}\n"):  # some models open it once more
        answer = read(dialect, f"{begun}a\n\nb\n{closing}\n\nHi", reasoning_open=True)
        assert (answer.reasoning, answer.text) == ("a\n\nb", "Hi")
    call = forms[name].write([("now", {})])
    answer = read(dialect, f"a{closing}\n\n{call}", reasoning_open=True)
    assert (answer.reasoning, answer.text, answer.calls) == ("a", "", [("now", {})])


@pytest.mark.parametrize("name", ["hermes_json", "deepseek", "mistral"])
def test_calls_inside_the_reasoning_are_reasoning(read: Read, forms: Any, name: str) -> None:
    call = forms[name].write([("now", {})])
    assert read(forms[name].dialect, f"a {call} b", reasoning_open=True).reasoning == f"a {call} b"


def test_a_model_without_tools_has_its_reasoning_split(join: Callable[..., Any]) -> None:
    for text, is_open in (("<think>\na\n</think>\n\nb <tool_call>", False), ("a</think>b <tool_call>", True)):
        parser = PlainParser(is_open)
        answer = join([event for piece in text for event in parser.push(piece)] + parser.finish())
        assert (answer.reasoning, answer.text) == ("a", "b <tool_call>")
