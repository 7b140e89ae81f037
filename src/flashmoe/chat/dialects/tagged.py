"""Answers of the common shape: a <think> block if any, then text with calls behind opening markers."""

from __future__ import annotations

from flashmoe.chat.dialects.parsing import DialectParser, Emit, ParserOptions
from flashmoe.chat.dialects.source import Step

# Begin and end of the reasoning.
ThinkTags = tuple[str, str]
THINK: ThinkTags = ("<think>", "</think>")


def ends_inside(prompt: str, think: ThinkTags = THINK) -> bool:
    """Whether a rendered prompt ends with an open reasoning block: its opening marker, perhaps white space."""
    return prompt.rstrip().endswith(think[0])


class TaggedParser(DialectParser):
    """Reasoning, text and calls, in that order; reasoning is recognised at the beginning only.

    White space before and between calls, and newlines around the reasoning, belong to the format and are dropped: the
    models' own templates write a conversation down like that.
    """

    def __init__(
        self,
        options: ParserOptions,
        openers: tuple[str, ...] = (),
        closers: tuple[str, ...] = (),
        think: ThinkTags = THINK,
        calls_end_reasoning: bool = False,
    ) -> None:
        """openers: markers that begin a call; closers: markers without meaning that may follow one.

        calls_end_reasoning: the model may call a tool without having closed its reasoning.
        """
        super().__init__(options)
        self._openers = openers if options.tools else ()
        self._closers = closers
        self._think = think
        self._calls_end_reasoning = calls_end_reasoning
        self.reasoning = False

    def _calls(self, opener: str) -> Step[None]:
        """Read what follows the opening marker into self.draft.  Raises Malformed where it is no call: here, always."""
        yield from self.source.expect()

    def _run(self) -> Step[None]:
        yield from self._reasoning_begins()
        if self.reasoning:
            yield from self._read_reasoning()
        while (found := (yield from self._passage(self._openers, self.emit_text))) is not None:
            yield from self._open(found, self.emit_text)

    def _reasoning_begins(self) -> Step[None]:
        source = self.source
        yield from source.spaces()
        opened = yield from source.accept(self._think[0])
        self.reasoning = opened is not None or self.options.reasoning_open
        if opened is None:
            source.position = 0
        if self.reasoning:
            yield from source.spaces("\n")

    def _read_reasoning(self) -> Step[None]:
        source, closing = self.source, self._think[1]
        markers = (closing, *(self._openers if self._calls_end_reasoning else ()))
        while (found := (yield from self._passage(markers, self.emit_reasoning))) is not None:
            at, marker = found
            if marker == closing:
                self.emit_reasoning(source.take(at).rstrip("\n"))
                source.take(at + len(closing))
                yield from source.spaces("\n")
                break
            if (yield from self._open(found, self.emit_reasoning)):
                break
        self.reasoning = False

    def _open(self, found: tuple[int, str], emit: Emit) -> Step[bool]:
        at, opener = found
        complete = yield from self._attempt(self._calls_behind(at, opener), emit)
        if complete:
            yield from self._behind_calls()
        return complete

    def _calls_behind(self, at: int, opener: str) -> Step[None]:
        self.source.position = at + len(opener)
        yield from self._calls(opener)

    def _behind_calls(self) -> Step[None]:
        """Drop closing markers, and white space at the very end; what precedes more text is kept."""
        source = self.source
        mark = source.position
        yield from source.spaces()
        while (yield from source.accept(*self._closers)) is not None:
            mark = source.position
            yield from source.spaces()
        source.position = len(source.text) if source.at_end("", *self._closers) else mark
