"""Stop strings: the text is cut at the first one, and nothing that may begin one is shown too early."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flashmoe.chat.stopping import StopStrings


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    shown = ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + matcher.flush(), False


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["END", "\n\n"])
    assert matcher.push("a\n") == ("a", False)
    assert matcher.push("bE") == ("\nb", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("x") == ("ENx", False)
    assert matcher.push("yEN") == ("y", False)
    assert matcher.push("D more") == ("", True)
    assert matcher.flush() == ""


def test_the_earliest_of_several_counts() -> None:
    assert run(["one two three"], ["three", "two"]) == ("one ", True)


def test_without_stop_strings_everything_passes_at_once() -> None:
    assert StopStrings([]).push("abc") == ("abc", False)
    assert StopStrings([""]).push("abc") == ("abc", False)


def test_a_single_stop_string_is_not_a_list_of_letters() -> None:
    assert StopStrings("END").push("DENEND") == ("DEN", True)


@given(
    pieces=st.lists(st.text(alphabet="ab", max_size=3), max_size=12),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
)
def test_any_cutting_into_pieces_gives_the_same_text(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    # Streaming stops at the piece that completes a stop string: compare with the first completed one.
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    shown, stopped = run(list(text), stops)
    assert stopped == bool(ends)
    assert shown == (text[: min(start for end, start in ends if end == min(ends)[0])] if ends else text)
    assert run(pieces, stops)[1] == stopped
