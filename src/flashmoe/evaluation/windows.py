"""Cutting a long text into windows of tokens, and which tokens of each are scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flashmoe.errors import ConfigError

# How windows lie, each as people publish numbers.
RULES = ("sliding", "halves")


@dataclass(frozen=True)
class Window:
    """Tokens of a fresh sequence; those from `first_scored` (at least 1) on are predicted from all before them."""

    ids: list[int]
    first_scored: int

    @property
    def scored(self) -> int:
        """How many tokens are predicted."""
        return len(self.ids) - self.first_scored


def cut(
    ids: Sequence[int], size: int, stride: int, bos: int | None = None, rule: str = "sliding"
) -> Iterator[Window]:
    """Windows of at most `size` tokens over the text `ids` (without a BOS token).

    sliding: a window begins every `stride` tokens and scores what no window before it has scored; each starts with
    `bos` if the model has one.  stride = size cuts the text into pieces; a smaller one gives every token but the
    first ones at least size - stride tokens of context (the rule of Hugging Face's documentation).
    halves: consecutive full windows of which the second half is scored; `bos` heads the text and stands for the first
    token of each later window (the rule of llama.cpp's perplexity program).  The stride is the size.
    Raises ConfigError when size or stride make no sense or nothing would be scored.
    """
    if size < 4 or not 1 <= stride <= size:
        raise ConfigError(
            f"a window of {size} and a stride of {stride} tokens: give 1 <= stride <= window >= 4"
        )
    windows = list(_halves(ids, size, bos) if rule == "halves" else _sliding(ids, size, stride, bos))
    if not any(window.scored for window in windows):
        raise ConfigError(
            f"the text has {len(ids)} tokens, too few for a window of {size}: give a longer one"
        )
    yield from windows


def _sliding(ids: Sequence[int], size: int, stride: int, bos: int | None) -> Iterator[Window]:
    head = [] if bos is None else [bos]
    body = size - len(head)
    seen = begin = 0
    while seen < len(ids):
        own = [*head, *ids[begin : begin + body]]
        first = max(1, len(head) + seen - begin)
        seen = min(begin + body, len(ids))
        if len(own) > first:
            yield Window(own, first)
        begin += min(stride, body)


def _halves(ids: Sequence[int], size: int, bos: int | None) -> Iterator[Window]:
    text = list(ids) if bos is None else [bos, *ids]
    for begin in range(0, len(text) - size + 1, size):
        own = text[begin : begin + size]
        if bos is not None:
            own[0] = bos
        yield Window(own, size // 2 + 1)
