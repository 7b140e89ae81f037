"""Every token of a text is scored by exactly one window, with the context that the rule promises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.errors import ConfigError
from flashmoe.evaluation.windows import cut

BOS = 1000


@given(
    count=st.integers(8, 200),
    size=st.integers(4, 40),
    share=st.floats(0.01, 1.0),
    bos=st.sampled_from([None, BOS]),
)
def test_sliding_scores_each_token_once(count: int, size: int, share: float, bos: int | None) -> None:
    stride = max(1, int(size * share))
    scored: list[int] = []
    for window in cut(range(count), size, stride, bos):
        assert len(window.ids) <= size
        assert (window.ids[0] == BOS) == (bos is not None)
        text = window.ids[bos is not None :]
        assert text == list(range(text[0], text[0] + len(text)))
        scored += window.ids[window.first_scored :]
    if bos is not None:
        assert scored == list(range(count))
    elif stride < size:
        assert scored == list(range(1, count))  # nothing comes before the first
    else:
        assert scored == [i for i in range(count) if i % size]


def test_a_short_stride_gives_context() -> None:
    windows = list(cut(range(100), 20, 5))
    assert [w.first_scored for w in windows] == [1] + [15] * (len(windows) - 1)


def test_halves_follow_llama_cpp() -> None:
    """Its program: for each full chunk, BOS in the first place, positions n/2 .. n - 2 predict the next token."""
    first, second = cut(range(20), 8, 8, BOS, "halves")
    assert (first.ids, first.first_scored) == ([BOS, 0, 1, 2, 3, 4, 5, 6], 5)
    assert (second.ids, second.first_scored) == ([BOS, 8, 9, 10, 11, 12, 13, 14], 5)


@pytest.mark.parametrize(("count", "size", "stride"), [(50, 3, 3), (50, 8, 9), (50, 8, 0), (1, 8, 8)])
def test_what_cannot_be_cut_is_refused(count: int, size: int, stride: int) -> None:
    with pytest.raises(ConfigError):
        list(cut(range(count), size, stride))
